"""``mixencoder calibrate``: a temperature and a bias that turn a checkpoint's scores into probabilities."""

from pathlib import Path
from typing import Annotated

import typer

from mixencoder.cli.shared import BackendOption, DeviceOption, DtypeOption, say


def calibrate(
    data: Annotated[
        list[Path],
        typer.Argument(
            help="Files of candidate lists, or folders in BEIR layout with a first-stage run, that the model was not "
            "trained on.",
            show_default=False,
        ),
    ],
    model: Annotated[Path, typer.Option(help="Directory of the checkpoint; the calibration is written into it.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Use only the first N queries of each.")] = None,
    sample: Annotated[
        int | None, typer.Option(metavar="SEED", help="With --limit: draw the N at random with this seed instead.")
    ] = None,
    split: Annotated[str, typer.Option(help="Split of a BEIR folder.")] = "test",
    batch_size: Annotated[int, typer.Option(min=1, help="Texts encoded, or pairs scored, at once.")] = 32,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    backend: BackendOption = "auto",
) -> None:
    """Fit how scores become probabilities on candidate lists, and store it in the checkpoint's configuration.

    Scores and rankings do not change; rank and predict can then return probabilities too.
    """
    from mixencoder.architectures import load_engine
    from mixencoder.base.checkpoints.checkpoint import write_calibration
    from mixencoder.evaluation import read_tasks
    from mixencoder.evaluation.calibration import fit_calibration

    engine = load_engine(model, device=device, dtype=dtype, backend=backend)
    label2id = engine.config.class_numbers
    tasks = read_tasks(data, split=split, limit=limit, sample=sample, label2id=label2id)
    fitted = fit_calibration(engine, tasks, batch_size=batch_size)
    write_calibration(model, {"temperature": fitted.temperature, "bias": fitted.bias})
    say(
        f"temperature {fitted.temperature:.4g}, bias {fitted.bias:.4g} written to {model}; log loss "
        f"{fitted.log_loss:.4f} (a constant: {fitted.base_log_loss:.4f}), calibration error {fitted.error:.4f}"
    )
