"""The command line: ``mixencoder COMMAND``, a module for each command.

Results go to standard output; times, progress and warnings to standard error. Every error of the project, and bad
usage, ends with exit code 2 and one message. The model's modules are imported only by commands that need them.
"""

import typer

from mixencoder.cli import calibrate, demo, evaluate, explain, export, index, info, mine, rank, serve, train
from mixencoder.cli.shared import command

app = typer.Typer(
    name="mixencoder",
    help="Rank many candidates for a query by cross-attention; candidates are encoded ahead of time.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for function in (
    rank.rank,
    demo.demo,
    explain.explain,
    serve.serve,
    train.train,
    mine.mine,
    evaluate.evaluate,
    calibrate.calibrate,
    export.export,
    info.info,
):
    app.command()(command(function))
app.add_typer(index.app, name="index")
