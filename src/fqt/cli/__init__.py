"""The command line: wires the rooms together and turns errors into one line and an exit status.

Exit status: 0 done; 1 the training diverged, a bench found a wrong result, a certificate's verdict is not "exact",
or standard output could not be written; 2 bad input, or a record that could not be written; 130 interrupted with
the state saved.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import Any

import click

import fqt
from fqt.cli.analysis import diagnose_command, explain_command, plan_command
from fqt.cli.common import complain, say, steady_output
from fqt.cli.info import info_command
from fqt.cli.quantizers import catalog_command, certify_command
from fqt.cli.reports import report_command
from fqt.cli.reproduce import reproduce_command
from fqt.cli.speed import bench_command
from fqt.cli.training import compare_command, train_command
from fqt.errors import FqtError
from fqt.files import shown
from fqt.kernels.cpu.library import status as kernels
from fqt.train import Interrupted
from fqt.train.ranks import claims, started

__all__ = ["cli", "main"]

SECTIONS: dict[str, tuple[click.Command, ...]] = {
    "Train": (train_command, compare_command, report_command),
    "Look inside": (explain_command, diagnose_command, plan_command),
    "Quantizers": (catalog_command, certify_command),
    "Measure this library": (bench_command, reproduce_command),
    "This installation": (info_command,),
}
GREETING = """fqt {version}: fully quantized training of PyTorch models ({kernels} kernels)

Three things to do next:

  fqt train digits --recipe shq4d        a small net, gradients of 4 bits
  fqt diagnose runs/digits-shq4d-seed0   where its gradient noise comes from
  fqt explain digits --batch             what ran on integers, and why not all

In a loop of your own:  fqt.quantize_(model), then train as before.
All commands: fqt --help.  Something is wrong: fqt info."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of ``fqt``; ends the process with the exit status."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    sys.path.append(os.getcwd())  # so that --model finds a module beside the user; last, so that it hides none
    with steady_output() as out:
        status = _status(arguments)
        out.flush()
        if out.failure:
            complain(f"cannot write to standard output: {out.failure}")
            status = status or 1
    sys.exit(status)


def _status(arguments: list[str]) -> int:
    """Runs a command; what ended it is said in one line, by one process if there are several."""
    status = 2
    try:
        return cli.main(args=arguments, prog_name="fqt", standalone_mode=False) or 0
    except click.ClickException as error:
        line = error.format_message()
    except FqtError as error:
        line = str(error)
    except OSError as error:  # of the system, not of ours: where it was is all that there is to say
        where = f" ({shown(os.fsdecode(error.filename))})" if isinstance(error.filename, str | bytes) else ""
        line = f"{error.strerror or error}{where}"
    except _Stopped as stop:
        line, status = str(stop), 130
    except (KeyboardInterrupt, click.Abort):
        line, status = "interrupted", 130
    if claims("the end"):
        complain(line)
    return status


class _Stopped(Exception):
    """A training that the user stopped, with what goes on with it."""


class _Commands(click.Group):
    """A group whose help lists commands under the titles of `SECTIONS`, in its order."""

    def invoke(self, context: click.Context) -> Any:
        """Runs a command; says of a training that was stopped how this command goes on."""
        try:
            return super().invoke(context)
        except Interrupted as stop:
            resume = "with --resume " if context.invoked_subcommand == train_command.name else ""
            raise _Stopped(f"{stop}; the same command {resume}(not --force) continues") from stop

    def format_commands(self, context: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes one list for each title, all with one width of names."""
        longest = max(len(name) for name in self.commands)
        for title, commands in SECTIONS.items():
            with formatter.section(title):
                width = formatter.width - longest - 6
                formatter.write_dl([(f"{c.name:{longest}}", c.get_short_help_str(width)) for c in commands])


@click.group(
    cls=_Commands,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)
@click.version_option(fqt.__version__, prog_name="fqt")
@click.pass_context
def cli(context: click.Context) -> None:
    """Train PyTorch models with low-bit weights, activations and gradients, and see what each bit costs."""
    command = context.invoked_subcommand
    if command != "train" and started() > 1:
        asked = f"fqt {command or ''}".strip()
        raise FqtError(f"only `fqt train` runs on several processes: start `{asked}` without torchrun")
    if command is None:
        say(GREETING.format(version=fqt.__version__, kernels=kernels().level))


for _commands in SECTIONS.values():
    for _command in _commands:
        cli.add_command(_command)
