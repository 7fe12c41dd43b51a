"""The models of the experiments, by task: nets for images, transformers for text."""
