"""Entry point of `mgg-edge`: the commands, and how an error becomes one line and an exit code.

    0    done
    1    something failed while running
    2    an argument or option cannot be used as given
    3    a package or device is missing; the message has the line that installs it
    4    an exported step or a bundle's self-test does not match its reference
    130  interrupted, after completing what was begun

Data goes to standard output; everything said to people goes to standard error. What nobody foresaw keeps its traceback.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

import typer

import mgg_edge
from mgg_edge.cli.bench import bench
from mgg_edge.cli.calibrate import calibrate
from mgg_edge.cli.demo import demo
from mgg_edge.cli.doctor import doctor
from mgg_edge.cli.engines import engines_app
from mgg_edge.cli.eval import eval as eval_command
from mgg_edge.cli.export import export
from mgg_edge.cli.inspect import inspect
from mgg_edge.cli.log_lines import JsonHandler, logs_json
from mgg_edge.cli.output import standard_output
from mgg_edge.cli.replay import replay
from mgg_edge.cli.run import run
from mgg_edge.cli.state import state_app
from mgg_edge.cli.train import train
from mgg_edge.errors import MggEdgeError, MissingDependencyError, UsageError

__all__ = ["EXTRA_OF_PACKAGE", "app", "main"]

# Which extra brings a package that only some machines have.
EXTRA_OF_PACKAGE = {
    "torch": "export",
    "torchvision": "export",
    "timm": "export",
    "onnx": "export",
    "matplotlib": "export",
    "onnxruntime": "cpu",
}

# What the command line's library raises of words it does not know; where it is found differs between its versions.
CommandLineError: type[typer.BadParameter] = typer.BadParameter.__mro__[2]

INTERRUPTED = 130
REFUSED_NAMES = frozenset({errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM, errno.ENOTDIR})

app = typer.Typer(
    name="mgg-edge",
    help="Classifiers that adapt to what they see, without labels and without PyTorch on the device.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    epilog="Start with: mgg-edge run --source video.mp4 --save annotated.mp4",
)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"mgg-edge {mgg_edge.__version__}")
        raise typer.Exit


@app.callback()
def _global_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and leave.")
    ] = False,
) -> None:
    pass


for _command, _examples in (
    (demo, "mgg-edge demo --save demo.mp4"),
    (train, "mgg-edge train --backbone resnet50 --data clean_images/ --rule forward --out rule.safetensors"),
    (export, "mgg-edge export --backbone vit_tiny_patch16_224 --weights pretrained --batch 8 --out model.mgg"),
    (
        eval_command,
        "mgg-edge eval --bundle model.mgg --data glyphs.safetensors --methods none,tent,mgg --out results",
    ),
    (run, "mgg-edge run --bundle model.mgg --source video.mp4 --json | head -3"),
    (calibrate, "mgg-edge calibrate --bundle model.mgg --source clean.mp4 --out site.mgg"),
    (replay, "mgg-edge replay run.mggrun --bundle model.mgg --source video.mp4"),
    (inspect, "mgg-edge inspect model.mgg --json | jq .backbone"),
    (doctor, "mgg-edge doctor --bundle model.mgg"),
    (bench, "mgg-edge bench --bundle model.mgg --threads 1"),
):
    app.command(epilog=f"Example: {_examples}")(_command)
app.add_typer(state_app, name="state")
app.add_typer(engines_app, name="engines")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; ends by `SystemExit`.

    Args:
        arguments: the words after the program's name; those of the process when None.
    """
    logging.getLogger("mgg_edge").handlers.clear()
    with standard_output(_fail):
        try:
            ended = app(args=arguments, prog_name="mgg-edge", standalone_mode=not _asks_for_json(arguments))
            sys.exit(ended if isinstance(ended, int) else 0)
        except CommandLineError as error:
            logging.getLogger("mgg_edge").addHandler(JsonHandler())
            sys.exit(_fail(UsageError(error.format_message())))
        except typer.Abort:
            sys.exit(INTERRUPTED)
        except MggEdgeError as error:
            sys.exit(_fail(error))
        except OSError as error:
            # A name from the command line that the system refuses before anything was opened.
            if error.errno not in REFUSED_NAMES or not isinstance(error.filename, str | bytes):
                raise
            sys.exit(_fail(UsageError(f"{os.fsdecode(error.filename)}: cannot be used: {error.strerror}")))
        except ModuleNotFoundError as error:
            package = (error.name or "").partition(".")[0]
            if package not in EXTRA_OF_PACKAGE:
                raise
            line = f"pip install 'mgg-edge[{EXTRA_OF_PACKAGE[package]}]'"
            message = f"the package '{package}' is not installed; install it with: {line}"
            sys.exit(_fail(MissingDependencyError(message)))


def _asks_for_json(arguments: Sequence[str] | None) -> bool:
    """Whether the words ask for logs as JSON, among which the one that ends the command may be misspelt."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    return "--log-format=json" in words or ("--log-format", "json") in pairwise(words)


def _fail(error: MggEdgeError) -> int:
    """Say an error; the exit code."""
    with contextlib.suppress(MggEdgeError, BrokenPipeError):
        sys.stdout.flush()
    message = " ".join(str(error).split())
    if sys.stderr is not None:
        with contextlib.suppress(OSError):
            if logs_json():
                logging.getLogger("mgg_edge").error("%s", message)
            else:
                print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return error.exit_code
