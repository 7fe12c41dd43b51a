"""The paper's figures: what is measured for them (`measure`), the records (`record`), the drawings (`figures`).

A room on top of the others, which shows how they are used together; only the command line imports it.
"""
