"""Train one variant of the interaction on frozen encodings, and measure it on the development sets."""

import math
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import mean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.interaction.encodings import Lists
from benchmarks.interaction.features import UNSEEN
from benchmarks.interaction.variants import Variant
from mixencoder import MixEncoder
from mixencoder.base.backbones import start_weights
from mixencoder.evaluation.measures import RankingMeasures
from mixencoder.evaluation.model_scores import strict_ranking
from mixencoder.modeling import Attend, MixEncoderModel, QueryState
from mixencoder.training.losses import listwise_kl
from mixkernels import candidate_attention

MEASURE = "nDCG@10"
SHARES = (0.0, 0.25, 0.5, 1.0, 2.0)
"""Factors of the interaction that are measured beside the dual term."""
BATCH = 32
UNMINED = ("ubuntu_irc",)
"""Sources without mined negatives: most replies that are similar to a query would answer it as well."""
SHARE_SOURCES, SHARE_STEPS = ("qnli", "selqa"), 300
"""What the share of each pair is learned on, after the rest was trained without these sources."""
POINTS = (500, 2000, 5000, 10000, 20000)
"""Steps after which a run is measured, as far as it goes."""
_MOST_PAIRS = 4096
"""Pairs scored at once when measuring."""


class Terms(NamedTuple):
    """The parts of a score, float32, (B, c) each."""

    interaction: Tensor
    dual: Tensor


class FrozenScorer(nn.Module):
    """The layers on top of a frozen encoder in one variant: what is trained.

    Args:
        backbone: path of the encoder.
        variant: what is built.
    """

    def __init__(self, backbone: str, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        engine = MixEncoder.from_backbone(
            backbone, num_context_embeddings=variant.contexts, interaction_layers=list(variant.layers), dual_term=True
        )
        model: MixEncoderModel = engine.model
        d = model.config.hidden_size
        layers = model.config.interaction_layer_indices
        frozen = [start_weights(model.backbone, layer) for layer in layers]
        self.heads = model.config.backbone_config.num_attention_heads
        self._projections = [[weights[name] for name in ("key", "value")] for weights in frozen]
        model.backbone = nn.Identity()
        self.model = model.requires_grad_(True)
        if variant.score == "cosine":
            self.scale = nn.Parameter(torch.tensor(5.0))
        elif variant.score == "gain":
            self.scale = nn.Parameter(torch.tensor(0.0))
        self.query_head = _Residual(d) if variant.heads in ("query", "both") else nn.Identity()
        self.document_head = _Residual(d) if variant.heads == "both" else nn.Identity()
        self.share = _Share() if variant.gated else None

    def forward(self, lists: Lists, rows: Sequence[int], columns: Tensor) -> Terms:
        """Score documents (B, c), given by number, for queries given by number."""
        state = self._query_state(lists, rows)
        candidates = contexts_of(lists, self.variant.form, columns)
        pooled = lists.documents.forms["mean"][columns, 0].float()
        assert state.pooled is not None, "the query's mean is always there"
        q = self.query_head(state.pooled).unsqueeze(1)
        dual = self.model.dual_term(q, self.document_head(pooled))
        assert dual is not None, "the model has a dual term"
        if not self.variant.interacts:
            return Terms(torch.zeros_like(dual), dual)
        attends = [_attend(state, layer) for layer in range(len(self.variant.layers))]
        with torch.autocast("cpu", torch.bfloat16):
            h, e = self.model.run_interaction(candidates, attends)
        interaction = self._interaction(h.float(), e.float())
        if self.share is not None:
            interaction = interaction * self.share(interaction, dual, state.lengths)
        return Terms(interaction, dual)

    def groups(self) -> list[dict[str, Any]]:
        """Return parameter groups with their peak rates; the two scales learn faster."""
        scales = {id(parameter) for name, parameter in self.named_parameters() if name.endswith("scale")}
        trained = [parameter for name, parameter in self.named_parameters() if not name.startswith("share.")]
        slow = [parameter for parameter in trained if id(parameter) not in scales]
        fast = [parameter for parameter in trained if id(parameter) in scales]
        return [{"params": slow, "lr": self.variant.rate}, {"params": fast, "lr": 10 * self.variant.rate}]

    def _interaction(self, h: Tensor, e: Tensor) -> Tensor:
        if self.variant.score == "cosine":
            return self.scale * F.cosine_similarity(h, e, dim=-1)
        product = (h * e).sum(dim=-1)
        # scaled as if h and e were as small as at the usual start
        return self.scale * product / math.sqrt(h.shape[-1]) if self.variant.score == "gain" else product

    def _query_state(self, lists: Lists, rows: Sequence[int]) -> QueryState:
        offsets = lists.queries.offsets
        lengths = torch.tensor([int(offsets[row + 1] - offsets[row]) for row in rows])
        keys, values = [], []
        for layer, projections in zip(self.variant.layers, self._projections, strict=True):
            tokens = lists.queries.tokens[layer]
            padded = nn.utils.rnn.pad_sequence(
                [tokens[offsets[row] : offsets[row + 1]].float() for row in rows], batch_first=True
            )
            found = [F.linear(padded, weights.weight, weights.bias).detach() for weights in projections]
            for kept, part in zip((keys, values), found, strict=True):
                kept.append(part.unflatten(-1, (self.heads, -1)))
        return QueryState(tuple(keys), tuple(values), lengths, lists.queries.mean[list(rows)].float())


class _Share(nn.Module):
    """A factor from 0 to 2 of the interaction of each pair, 1 at the start, from both terms and the query's length."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(3, 16), nn.Linear(16, 1)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, interaction: Tensor, dual: Tensor, lengths: Tensor) -> Tensor:
        """Return factors (B, c) for terms (B, c) and lengths (B,)."""
        tokens = (lengths.float() / 32).unsqueeze(1).expand_as(dual)
        features = torch.stack([interaction.detach() / 10, dual.detach() / 10, tokens], dim=-1)
        return 2 * torch.sigmoid(self.outer(torch.tanh(self.inner(features)))).squeeze(-1)


class _Residual(nn.Module):
    """``x + W_2 GELU(W_1 x)``, the identity at the start."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(d, d), nn.Linear(d, d)
        nn.init.zeros_(self.outer.weight)
        nn.init.zeros_(self.outer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., d) to (..., d)."""
        # inputs of unit length, so that encoders whose vectors are longer learn alike
        unit = F.normalize(x, dim=-1) * math.sqrt(x.shape[-1])
        return unit + self.outer(F.gelu(self.inner(unit)))


def contexts_of(lists: Lists, form: str, columns: Tensor) -> Tensor:
    """Return the context embeddings (..., k, d) of documents in a form; "mean+NAME" puts the mean before another form,
    whose last vector it replaces."""
    forms = lists.documents.forms
    if form.startswith("mean+"):
        other = forms[form.removeprefix("mean+")][columns].float()
        return torch.cat([forms["mean"][columns].float(), other[..., :-1, :]], dim=-2)
    return forms[form][columns].float()


def _attend(state: QueryState, layer: int) -> Attend:
    """Return the attention of an interaction layer to the queries."""

    def attend(query: Tensor, key: Tensor, value: Tensor, state_query: Tensor | None) -> tuple[Tensor, Tensor | None]:
        found = candidate_attention(
            query, key, value, state_query, state.keys[layer], state.values[layer], key_lengths=state.lengths
        )
        return found.context, found.state

    return attend


class Batches:
    """Draws batches from sources in turn by weight: queries with lists of one right document and wrong ones.

    Args:
        sources: by name.
        variant: how many mined and how many other documents a list holds.
        seed: of all draws.
    """

    def __init__(self, sources: Mapping[str, Lists], variant: Variant, seed: int) -> None:
        self._sources, self._variant = list(sources.items()), variant
        self._chance = random.Random(seed)
        # small sources less often, but not in proportion
        self._weights = [len(source.candidates) ** 0.5 for source in sources.values()]

    def __call__(self) -> tuple[Lists, list[int], Tensor, Tensor]:
        """Return a source, queries and documents (B, c) by number, and which documents are no negatives (B, c)."""
        chance, variant = self._chance, self._variant
        name, source = chance.choices(self._sources, self._weights)[0]
        wanted, others = variant.mined, variant.others
        if name in UNMINED:
            wanted, others = 0, wanted + others
        rows = chance.sample(range(len(source.candidates)), min(BATCH, len(source.candidates)))
        right = [
            [number for number, grade in zip(source.candidates[row], source.grades[row], strict=True) if grade]
            for row in rows
        ]
        firsts = [chance.choice(numbers) for numbers in right]
        columns, excluded = [], []
        assert source.mined is not None, "sources have mined documents"
        for place, row in enumerate(rows):
            listed = [n for n, grade in zip(source.candidates[row], source.grades[row], strict=True) if not grade]
            hard = chance.sample(listed, min(wanted // 2, len(listed)))
            mined = source.mined[row].tolist()
            hard += chance.sample(mined, min(wanted - len(hard), len(mined)))
            wrong = hard + [firsts[(place + 1 + step) % len(rows)] for step in range(min(others, len(rows) - 1))]
            wrong += [firsts[place]] * (wanted + others - len(wrong))
            columns.append([firsts[place], *wrong])
            excluded.append([False, *(number in right[place] for number in wrong)])
        return source, rows, torch.tensor(columns), torch.tensor(excluded)


def loss_of(terms: Terms, excluded: Tensor, variant: Variant, wanted: Tensor | None = None) -> Tensor:
    """Cross-entropy of the full score and, by weight, of the interaction alone; with a teacher also the divergence."""
    target = torch.zeros(len(excluded), dtype=torch.int64)

    def ranking(scores: Tensor) -> Tensor:
        return F.cross_entropy(scores.masked_fill(excluded, -torch.inf), target)

    full = terms.interaction + terms.dual
    loss = ranking(full)
    if variant.interacts and variant.own_loss:
        loss = loss + variant.own_loss * ranking(terms.interaction)
    if wanted is not None:
        taught = listwise_kl(full, wanted, excluded)
        if variant.interacts and variant.own_loss:
            taught = taught + variant.own_loss * listwise_kl(terms.interaction, wanted, excluded)
        loss = (1 - variant.teacher_weight) * loss + variant.teacher_weight * taught
    return loss


def measure(scorer: FrozenScorer, sets: Mapping[str, Lists]) -> dict[str, Any]:
    """Return {set: {share: figure}}, and the interaction's alone under "alone"; NaN scores would be an error."""
    found: dict[str, Any] = {}
    scorer.eval()
    for name, lists in sets.items():
        terms: list[Terms] = []
        with torch.inference_mode():
            for row, numbers in enumerate(lists.candidates):
                columns = torch.tensor(numbers)
                parts = [scorer(lists, [row], part.unsqueeze(0)) for part in columns.split(_MOST_PAIRS)]
                terms.append(Terms(*(torch.cat(column, dim=1)[0] for column in zip(*parts, strict=True))))
        names = [[str(number) for number in range(len(numbers))] for numbers in lists.candidates]
        qrels = [dict(zip(ids, grades, strict=True)) for ids, grades in zip(names, lists.grades, strict=True)]
        figure = RankingMeasures([MEASURE], [{n: g for n, g in marks.items() if g} for marks in qrels])

        def figure_of(scores: Sequence[Tensor], names=names, qrels=qrels, figure=figure) -> float:
            rankings = [
                strict_ranking(ids, row.tolist(), marks) for ids, row, marks in zip(names, scores, qrels, strict=True)
            ]
            return figure(rankings)[MEASURE].value

        found[name] = {str(share): figure_of([share * t.interaction + t.dual for t in terms]) for share in SHARES}
        found[name]["alone"] = figure_of([t.interaction for t in terms])
    scorer.train()
    return found


def unseen_summary(found: Mapping[str, Any]) -> dict[str, float]:
    """Return mean figures of the sets of unseen domains: every share, and the share chosen on all other sets."""
    keys = [*map(str, SHARES), "alone"]
    summary = {key: mean(found[name][key] for name in UNSEEN) for key in keys}
    chosen = []
    for name in UNSEEN:
        others = [other for other in UNSEEN if other != name]
        best = max(map(str, SHARES), key=lambda share: mean(found[other][share] for other in others))
        chosen.append(found[name][best])
    return summary | {"chosen on the others": mean(chosen)}


def learn(
    backbone: str,
    variant: Variant,
    sources: Mapping[str, Lists],
    sets: Mapping[str, Lists],
    teacher: Mapping[str, tuple[Tensor, Tensor]] | None,
    seed: int,
) -> dict[str, Any]:
    """Train a variant and return its record.

    Args:
        backbone: path of the encoder.
        variant: what is tried.
        sources, sets: what it learns from and is measured on.
        teacher: {source: unit vectors of its queries and documents by a larger encoder}.
        seed: of weights and batches.
    """
    torch.manual_seed(seed)
    scorer = FrozenScorer(backbone, variant)
    kept = {name: source for name, source in sources.items() if variant.gated and name in SHARE_SOURCES}
    rest = {name: source for name, source in sources.items() if name not in kept}
    start, points, spent = time.perf_counter(), [], 0.0
    share = [] if scorer.share is None else list(scorer.share.parameters())
    for parameter in share:
        parameter.requires_grad_(False)
    for step, loss in _steps(scorer, scorer.groups(), rest, variant, variant.steps, teacher, seed):
        is_last = step == variant.steps
        if is_last and share:
            scorer.requires_grad_(False)
            for parameter in share:
                parameter.requires_grad_(True)
            groups = [{"params": share, "lr": variant.rate}]
            for _ in _steps(scorer, groups, kept, variant, SHARE_STEPS, teacher, seed):
                pass
        if step in POINTS or is_last:
            pause = time.perf_counter()
            found = measure(scorer, sets)
            points.append({"steps": step, "loss": loss, "sets": found, "unseen": unseen_summary(found)})
            spent += time.perf_counter() - pause
    return {"seconds": {"train": time.perf_counter() - start - spent, "measure": spent}, "points": points}


def _steps(
    scorer: FrozenScorer,
    groups: list[dict[str, Any]],
    sources: Mapping[str, Lists],
    variant: Variant,
    steps: int,
    teacher: Mapping[str, tuple[Tensor, Tensor]] | None,
    seed: int,
) -> Iterator[tuple[int, float]]:
    """Train parameter groups with AdamW; after every step yield its number, from 1, and its loss."""
    names = {id(source): name for name, source in sources.items()}
    optimiser = torch.optim.AdamW(groups, weight_decay=0.01, fused=True)
    peaks = [group["lr"] for group in groups]
    trained = [parameter for group in groups for parameter in group["params"]]
    batches = Batches(sources, variant, seed)
    for step in range(1, steps + 1):
        for group, peak in zip(optimiser.param_groups, peaks, strict=True):
            group["lr"] = peak * _rate(step, steps)
        source, rows, columns, excluded = batches()
        wanted = None
        if variant.teacher:
            assert teacher is not None, "a variant with a teacher is given its vectors"
            queries, documents = teacher[names[id(source)]]
            wanted = torch.einsum("bd,bcd->bc", queries[rows], documents[columns]) * variant.teacher_scale
        loss = loss_of(scorer(source, rows, columns), excluded, variant, wanted)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimiser.step()
        yield step, loss.item()


def _rate(step: int, steps: int) -> float:
    """Return the share of the peak rate: warm up over 100 steps, stay, fall to zero over the last tenth."""
    return min(1.0, step / 100, (steps - step + 1) / max(1, steps // 10))
