"""Whether the gradients of a training are released within its passes, and what is said of it."""

import torch

from sftcli.config.schema.training import TrainingSettings
from sftcli.data.batches.batch import BatchPlan
from sftcli.errors import Location, UsageError
from sftcli.events import EventSink, Notice
from sftcli.training.distributed.group import Group
from sftcli.training.optim.release import GradientRelease
from sftcli.training.weights.masters import MasterWeights


def gradient_release(
    weights: MasterWeights,
    optimizer: torch.optim.Optimizer,
    settings: TrainingSettings,
    *,
    group: Group,
    plan: BatchPlan,
    emit: EventSink,
) -> GradientRelease | None:
    """Return what updates ``weights`` within a pass, where ``settings`` ask for it, and say what that comes to.

    Raises:
        UsageError: They cannot be updated there.
    """
    if not settings.release_gradients:
        return None
    if reason := _obstacle(weights, group):
        raise UsageError(
            f"training.release_gradients updates weights in the backward pass, and {reason}",
            hint="leave training.release_gradients false",
            location=Location(key="training.release_gradients"),
        )
    release = GradientRelease(weights, optimizer, max_norm=settings.clips_to)
    emit(Notice(text=_in_words(release, len(plan.window(0)))))
    return release


def _obstacle(weights: MasterWeights, group: Group) -> str:
    if group.size > 1:
        return "several processes sum their gradients behind it"
    if weights.compute_dtype == torch.float16:
        return "the gradients of float16 products are scaled behind it"
    if weights.has_buffers:
        return "a pass of this model changes buffers, so that it cannot be computed twice"
    return ""


def _in_words(release: GradientRelease, micro_batches: int) -> str:
    if micro_batches > 1:
        return (
            f"a step has {micro_batches} micro-batches, whose gradients are summed: none is freed in the backward pass; a smaller "
            "training.batch_size or a larger micro-batch makes it one"
        )
    if release.computes_twice:
        return (
            "gradients are freed in the backward pass; it is computed twice, first for the norm that they are clipped to: "
            "training.max_grad_norm=0 spares that"
        )
    return "gradients are freed in the backward pass, and are not clipped"
