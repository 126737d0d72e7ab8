"""Progress bars: shown where asked for, and nothing at all where not."""

import logging
import sys

import pytest

from mixencoder import progress
from mixencoder.progress import NoProgress, progress_bar


def test_a_bar_that_is_not_shown_takes_no_lock(monkeypatch):
    # tqdm's lock is shared with forked processes, and a killed one may hold it for ever
    monkeypatch.setitem(sys.modules, "tqdm", None)
    with progress_bar(3, "Texts", "text", show=False) as bar:
        bar.update()
    assert isinstance(bar, NoProgress)


@pytest.mark.parametrize(("level", "shown"), [(logging.INFO, True), (logging.WARNING, False)])
def test_by_default_the_librarys_logger_decides(monkeypatch, capsys, level, shown):
    monkeypatch.setattr(progress.logger, "level", level)
    progress.logger.manager._clear_cache()
    with progress_bar(2, "Texts", "text", show=None) as bar:
        bar.update(2)
    assert ("Texts: 100%" in capsys.readouterr().err) == shown
