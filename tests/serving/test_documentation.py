"""The requests of docs/serving.md, sent as printed, give the answers that stand below them."""

import json
import re
import shlex
from pathlib import Path

import pytest

from mixencoder import MixEncoder
from mixencoder.data.candidates import read_candidates

PAGE = Path(__file__).parents[2] / "docs" / "serving.md"
MADE_UP = re.compile(r"(rerank|score)-[0-9a-f]{32}")


def curls_and_answers() -> list[tuple[list[str], list[str]]]:
    """The curl commands of each block of bash, and the lines of the block of answers that follows it."""
    blocks = re.findall(r"```(bash|json|text)\n(.*?)```", PAGE.read_text(encoding="utf-8"), flags=re.S)
    found = []
    for kind, text in blocks:
        if kind == "bash" and text.startswith("curl"):
            found.append((text.splitlines(), []))
        elif kind != "bash":
            found[-1][1].extend(text.splitlines())
    return found


@pytest.fixture
def client(tmp_path):
    """A client of a server started as the page says: the bundled model, an index of the examples, writes allowed."""
    testclient = pytest.importorskip("fastapi.testclient")
    from mixencoder.serving.app import create_app
    from mixencoder.serving.ranking import quiet_engine
    from mixencoder.serving.settings import ServeConfig

    engine = MixEncoder.from_pretrained()
    texts = read_candidates(str(PAGE.parent / "examples" / "candidates.txt")).texts
    engine.index(texts, path=tmp_path / "index").close()
    with (
        quiet_engine(engine).open_index(tmp_path / "index") as index,
        testclient.TestClient(create_app(ServeConfig(allow_writes=True), engine, index)) as client,
    ):
        yield client


def test_the_requests_give_the_answers_that_are_printed(client):
    blocks = curls_and_answers()
    assert sum(len(commands) for commands, _ in blocks) >= 7
    for commands, answers in blocks:
        for number, command in enumerate(commands):
            words = shlex.split(command)
            method = words[words.index("-X") + 1] if "-X" in words else "POST"
            (address,) = [word for word in words if word.startswith("localhost:8000")]
            name, _, value = words[words.index("-H") + 1].partition(": ")
            path, body = address.removeprefix("localhost:8000"), words[words.index("-d") + 1]
            response = client.request(method, path, content=body, headers={name: value})
            assert response.status_code == 200, response.text
            if answers:
                printed, cut, _ = answers[number].partition(",...}")
                found = response.text[: len(printed)] if cut else response.text
                assert near(MADE_UP.sub("", found), MADE_UP.sub("", printed)), response.text


def near(found: str, printed: str) -> bool:
    """Whether two texts are equal but for the last digits of numbers, which may differ between machines."""
    number = r"\d\.\d{6,}(?:e-?\d+)?"
    same = re.sub(number, "#", found) == re.sub(number, "#", printed)
    pairs = zip(re.findall(number, found), re.findall(number, printed), strict=False)
    return same and all(float(one) == pytest.approx(float(other), rel=1e-3) for one, other in pairs)


def test_answers_are_json():
    for _, answers in curls_and_answers():
        for answer in answers:
            if not answer.endswith(",...}"):
                json.loads(answer)
