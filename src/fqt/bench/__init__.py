"""Measuring: layers, whole steps and quantizers against the best float training has, each result verified first.

Everything is reached through the public interface, so that what is measured is what a user gets. Imported by
nobody but the command line.
"""

from fqt.bench.cases import CASES as CASES
from fqt.bench.cases import Case as Case
from fqt.bench.cases import Floor as Floor
from fqt.bench.cases import select as select
from fqt.bench.device import device_named as device_named
from fqt.bench.measure import Request as Request
from fqt.bench.measure import failures as failures
from fqt.bench.measure import run as run
from fqt.bench.progress import ConsoleObserver as ConsoleObserver
from fqt.bench.summary import read_bench as read_bench
from fqt.bench.summary import results as results
from fqt.bench.tables import list_table as list_table
from fqt.bench.tables import markdown as markdown
from fqt.bench.tables import terminal_tables as terminal_tables
