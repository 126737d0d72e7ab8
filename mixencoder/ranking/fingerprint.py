"""What a model may do with an index: its fingerprint compared with the model's, part by part.

The embeddings E_0 that an index stores depend on the model's encoder alone; only the layout "projected" also stores
what the first interaction layer computes from them. So an index serves every model with its encoder: if the projection
is another one, ranking reads the embeddings and computes the rest, but rows must not be added.
"""

from typing import Any, NamedTuple, NoReturn

from mixencoder.base.texts import printable
from mixencoder.errors import IndexMismatchError
from mixencoder.index.manifest import Manifest
from mixencoder.modeling import MixEncoderModel
from mixencoder.ranking.identity import ModelIdentity
from mixencoder.ranking.record_format import RecordFormat

DOCUMENT_TOKENS = "document tokens"
"""Part of a fingerprint: the limit at which documents were cut."""


def part_names(layout: Any) -> tuple[str, ...]:
    """Return the parts of `ModelIdentity` that the fingerprint of a new index has."""
    return ("encoder", "tokenizer", "dtype", *(["projection"] if layout == "projected" else []))


class IndexMatch(NamedTuple):
    """An index beside a model, and the fingerprint that it would have if the model had made it; from `match_index`."""

    model: MixEncoderModel
    manifest: Manifest
    expected: dict[str, str]

    @property
    def has_same_projection(self) -> bool:
        """Whether the stored projections, if there are any, are the model's."""
        return self.manifest.fingerprint.get("projection") == self.expected.get("projection")

    def check_ranking(self, what: str) -> None:
        """Raise if the model cannot rank the index.

        Args:
            what: the index, for the message.

        Raises:
            IndexMismatchError: a part differs other than the projection; or the projection does, and the index lacks
                the embeddings that the model needs.
        """
        found = self.manifest.fingerprint
        projection = {name: found[name] for name in ("projection",) if name in found and name in self.expected}
        self.manifest.check_fingerprint(what, {**self.expected, **projection})
        if self.has_same_projection or stores_embeddings(self.manifest) or not self.model.config.context_update:
            return
        self._fail(
            what,
            "stores only the mean of the context embeddings, all of which this model needs. Use the one that made it, "
            "or build it again",
        )

    def check_adding(self, what: str) -> None:
        """Raise if rows of the model do not belong in the index.

        Args:
            what: the index, for the message.

        Raises:
            IndexMismatchError: a part differs.
        """
        self.check_ranking(what)
        if self.has_same_projection:
            return
        if not self.manifest.complete:
            advice = "finish it with the model that began it, or delete it and build it again"
        elif stores_embeddings(self.manifest):
            advice = "copy it for this model with project_index() (mixencoder index project), and add to the copy"
        else:
            advice = "use the model that made it, or build it again"
        self._fail(what, f"can be ranked, but not added to: {advice}")

    def record_format(self) -> RecordFormat:
        """Return the format in which the model reads the index, once `check_ranking` has passed."""
        layout, precision = (self.manifest.settings[name] for name in ("layout", "precision"))
        if self.has_same_projection:
            return RecordFormat(self.model, layout, precision)
        if stores_embeddings(self.manifest):
            return RecordFormat(self.model, "compact", precision)
        return RecordFormat(self.model, layout, precision).without_projection()

    def _fail(self, what: str, consequence: str) -> NoReturn:
        """Raise because the projections are another model's."""
        found, expected = self.manifest.fingerprint, self.expected
        raise IndexMismatchError(
            printable(
                f"{what} holds projections by {found.get('name', 'another model')}, whose interaction is not that of "
                f"this {expected['name']}: projection is {found['projection']}, expected {expected['projection']}. It "
                f"{consequence}"
            )
        )


def match_index(
    model: MixEncoderModel,
    identity: ModelIdentity,
    manifest: Manifest,
    *,
    version: int | None = None,
    document_tokens: int | None = None,
) -> IndexMatch:
    """Compare an index with a model.

    Args:
        model, identity: the model.
        manifest: of the index.
        version: of the model's weights (`weights_version`); hashes are then remembered. None reads all weights again.
        document_tokens: the model's limit; None accepts an index with any.
    """
    found = manifest.fingerprint
    # indexes that were made before encoder and projection were told apart have one hash of all weights
    names = ("weights", "tokenizer", "dtype") if "weights" in found else part_names(manifest.settings.get("layout"))
    parts = identity.parts(names) if version is None else identity.remembered_parts(version, names)
    limit = found.get(DOCUMENT_TOKENS, "any") if document_tokens is None else str(document_tokens)
    return IndexMatch(model, manifest, {"name": identity.name, **parts, DOCUMENT_TOKENS: limit})


def stores_embeddings(manifest: Manifest) -> bool:
    """Return whether an index holds E_0; without context update, the layout "projected" holds only its mean."""
    return any(field.name == "context" for field in manifest.schema.fields)
