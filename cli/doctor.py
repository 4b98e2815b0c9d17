"""`mgg-edge doctor`: can the run time work here, and does a bundle compute what it should."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mgg_edge.cli.bundle_name import bundle_option
from mgg_edge.cli.engine_name import ENGINE_HELP, EngineName
from mgg_edge.errors import MissingDependencyError, ParityError

if TYPE_CHECKING:
    from mgg_edge.runtime.doctor import Environment
    from mgg_edge.runtime.engines.self_test import SelfTest

__all__ = ["doctor"]


def doctor(
    bundle: Annotated[
        Path | None,
        bundle_option("Bundle (.mgg) whose self-test to run on this machine; 'default' is the package's."),
    ] = None,
    engine: Annotated[EngineName, typer.Option(help=ENGINE_HELP)] = EngineName.AUTO,
    json: Annotated[bool, typer.Option("--json", help="One JSON object instead of a table.")] = False,
) -> None:
    """Say what this machine has and whether the run time works on it.

    With --bundle, also run the bundle's self-test and compare with the results recorded at export.
    """
    from mgg_edge.runtime.doctor import environment

    found = environment()
    test = _self_test(bundle, engine) if bundle is not None and not found.problems else None
    if json:
        import json as json_codec

        facts = asdict(found) | {"self_test": asdict(test) | {"passed": test.passed} if test is not None else None}
        sys.stdout.write(json_codec.dumps(facts, indent=2) + "\n")
    else:
        _print(found, test)
    if found.problems:
        raise MissingDependencyError("; ".join(found.problems))
    if test is not None and not test.passed:
        raise ParityError(
            f"{bundle}: the self-test differs from the recorded results on {test.engine}; the table has the differences"
        )


def _self_test(path: Path, name: EngineName) -> SelfTest:
    from mgg_edge.runtime.bundle.bundle import Bundle
    from mgg_edge.runtime.engines.engine import open_engine
    from mgg_edge.runtime.engines.self_test import self_test

    bundle = Bundle.load(path)
    engine = open_engine(bundle, name.value)
    try:
        return self_test(bundle, engine)
    finally:
        engine.close()


def _print(found: Environment, test: SelfTest | None) -> None:
    from mgg_edge.cli.display import print_facts, print_table

    print_facts(
        {
            "python": found.python,
            "system": f"{found.system}, {found.machine}, {found.cores} cores",
            "jetson": found.jetson or "no",
            "gpu": "yes" if found.gpu else "no",
            "providers": ", ".join(found.providers) or "none",
            "import": "failed" if found.import_ms is None else f"mgg_edge.runtime in {found.import_ms:.0f} ms",
        }
    )
    print_table(("package", "version"), [(name, version or "-") for name, version in found.packages.items()])
    if test is not None:
        print_table(
            (f"difference on {test.engine}", "found", "limit", ""),
            [
                (name, f"{value:.2e}", f"{limit:.0e}", "ok" if value <= limit else "FAILED")
                for name, value, limit in test.rows
            ],
        )
    for line in found.advice:
        sys.stdout.write(f"to use the GPU: {line}\n")
    sys.stdout.write("the run time works here\n" if not found.problems else "the run time cannot work here\n")
