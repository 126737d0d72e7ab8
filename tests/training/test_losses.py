"""Losses by hand, and the objective: what a batch is worth with and without a teacher."""

import math

import pytest
import torch

from mixencoder.base.modeling import RankingScores
from mixencoder.training.losses import graded_loss, listwise_kl, margin_mse, ranking_loss, similarity_loss
from mixencoder.training.objective import Objective, Teacher


def test_ranking_loss_is_cross_entropy_over_what_is_not_excluded():
    scores = torch.tensor([[1.0, 5.0, 0.0], [0.0, 2.0, 1.0]])
    excluded = torch.tensor([[False, True, False], [False, False, False]])
    by_hand = -(torch.log_softmax(scores[0, [0, 2]], 0)[0] + torch.log_softmax(scores[1], 0)[1]) / 2
    torch.testing.assert_close(ranking_loss(scores, torch.tensor([0, 1]), excluded), by_hand)


def test_similarity_loss_asks_for_the_order_alone():
    targets = torch.tensor([5.0, 1.0, 1.0])
    right, wrong = torch.tensor([4.0, -4.0, -5.0]), torch.tensor([-4.0, 4.0, 5.0])
    assert similarity_loss(right, targets) < 0.01 < 5 < similarity_loss(wrong, targets)
    by_hand = torch.log(1 + torch.exp(wrong[1] - wrong[0]) + torch.exp(wrong[2] - wrong[0]))
    torch.testing.assert_close(similarity_loss(wrong, targets), by_hand)
    assert similarity_loss(right, torch.ones(3)) == 0


def test_graded_loss_is_cross_entropy_of_two_softmaxes():
    scores = torch.tensor([[1.0, -2.0, 9.0]], requires_grad=True)
    grades, excluded = torch.tensor([[2.0, 0.0, 5.0]]), torch.tensor([[False, False, True]])
    wanted, found = [math.exp(2) / (math.exp(2) + 1), 1 / (math.exp(2) + 1)], torch.log_softmax(scores[0, :2], 0)
    loss = graded_loss(scores, grades, excluded)
    torch.testing.assert_close(loss, -(wanted[0] * found[0] + wanted[1] * found[1]))
    loss.backward()
    assert torch.isfinite(scores.grad).all()
    assert scores.grad[0, 2] == 0


def test_margins_are_those_of_the_first_column():
    scores, teacher = torch.tensor([[3.0, 1.0, 0.0], [1.0, 1.0, 1.0]]), torch.tensor([[9.0, 8.0, 0.0], [0.0, 2.0, 7.0]])
    excluded = torch.tensor([[False, False, True], [False, False, False]])
    # margins 2 against 1; 0 against -2 and -7
    torch.testing.assert_close(margin_mse(scores, teacher, excluded), torch.tensor((1.0 + 4.0 + 49.0) / 3))
    assert margin_mse(scores[:, :1], teacher[:, :1], excluded[:, :1]) == 0


def test_listwise_kl_is_zero_for_a_shifted_teacher_and_matches_the_formula():
    scores, excluded = torch.tensor([[1.0, 2.0, 50.0]], requires_grad=True), torch.tensor([[False, False, True]])
    assert listwise_kl(scores, scores.detach() + 5, excluded).abs() < 1e-6
    teacher, temperature = torch.tensor([[4.0, 0.0, 1.0]]), 2.0
    p, q = torch.softmax(teacher[0, :2] / temperature, 0), torch.softmax(scores[0, :2] / temperature, 0)
    by_hand = temperature**2 * (p * (p / q).log()).sum()
    loss = listwise_kl(scores, teacher, excluded, temperature)
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert torch.isfinite(scores.grad).all()


class Stub:
    """A teacher whose score is the document's length, and which counts what it was asked."""

    def __init__(self):
        self.asked = []

    def predict(self, pairs, *, head, **_):
        self.asked += pairs
        scores = torch.tensor([float(len(document)) for _, document in pairs])
        return scores if head == "ranking" else torch.stack([scores, -scores], dim=1)


def test_a_teacher_scores_every_pair_once():
    stub = Stub()
    teacher = Teacher(stub)
    pairs = [("q", "aa"), ("q", "b"), ("q", "aa")]
    assert teacher.score(pairs, "ranking").tolist() == [2.0, 1.0, 2.0]
    assert teacher.score(pairs, "ranking").tolist() == [2.0, 1.0, 2.0]
    assert stub.asked == [("q", "aa"), ("q", "b")]
    assert teacher.score(pairs[:1], "classification").tolist() == [[2.0, -2.0]]


def ranking_batch(own_lists: bool) -> dict:
    """Two queries; in-batch each also has one listed negative."""
    batch = {"task": "ranking", "queries": ["q", "r"], "where": ["", ""]}
    if own_lists:
        batch |= {"documents": ["a", "bbb", "cc", "dddd"], "candidates_per_query": 2}
        batch |= {"targets": torch.tensor([0, 0]), "excluded": torch.zeros(2, 2, dtype=torch.bool)}
        batch |= {"lists": torch.tensor([[0, 1], [0, 1]])}
    else:
        batch |= {"documents": ["a", "cc", "bbb", "dddd"], "candidates_per_query": None}
        batch |= {"targets": torch.tensor([0, 1]), "excluded": torch.zeros(2, 4, dtype=torch.bool)}
        batch |= {"lists": torch.tensor([[0, 2], [1, 3]])}
    return batch | {"lists_excluded": torch.zeros(2, 2, dtype=torch.bool)}


@pytest.mark.parametrize("own_lists", [False, True], ids=["in-batch", "lists"])
@pytest.mark.parametrize("distillation", ["kl", "margin-mse"])
def test_the_teachers_loss_is_weighed_against_the_labels(own_lists, distillation):
    batch = ranking_batch(own_lists)
    torch.manual_seed(0)
    scores = torch.randn(batch["excluded"].shape)

    def loss(**options):
        return Objective(**options)(lambda **_: RankingScores(scores, None), batch)[0]

    labels = loss()
    taught = loss(teacher=Teacher(Stub()), distillation=distillation, distillation_weight=1.0)
    wanted = torch.tensor([[1.0, 3.0], [2.0, 4.0]])
    none = torch.zeros(2, 2, dtype=torch.bool)
    by_hand = (listwise_kl if distillation == "kl" else margin_mse)(scores.gather(1, batch["lists"]), wanted, none)
    torch.testing.assert_close(taught, by_hand)
    both = loss(teacher=Teacher(Stub()), distillation=distillation, distillation_weight=0.25)
    torch.testing.assert_close(both, 0.75 * labels + 0.25 * taught)


def test_the_interaction_alone_gets_the_same_loss_where_there_is_a_dual_term():
    batch = ranking_batch(own_lists=False)
    torch.manual_seed(0)
    interaction, dual = torch.randn(2, 2, 4)
    loss, scores = Objective(interaction_loss_weight=0.3)(lambda **_: RankingScores(interaction, dual), batch)
    torch.testing.assert_close(scores, interaction + dual)
    alone = [ranking_loss(part, batch["targets"], batch["excluded"]) for part in (interaction + dual, interaction)]
    torch.testing.assert_close(loss, alone[0] + 0.3 * alone[1])


def test_class_logits_are_taught_by_kl():
    batch = {"task": "classification", "targets": torch.tensor([1, 0]), "candidates_per_query": 1, "where": ["", ""]}
    batch |= {"queries": ["q", "r"], "documents": ["a", "bb"]}
    logits = torch.tensor([[[1.0, 2.0]], [[0.5, 0.0]]])
    objective = Objective(teacher=Teacher(Stub()), distillation_weight=1.0)
    loss, _ = objective(lambda **_: logits, batch)
    wanted, none = torch.tensor([[1.0, -1.0], [2.0, -2.0]]), torch.zeros(2, 2, dtype=torch.bool)
    torch.testing.assert_close(loss, listwise_kl(logits.squeeze(1), wanted, none))
