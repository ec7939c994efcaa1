"""Trainers whose processes share the weights out, on tiny models of several kinds."""

from dataclasses import replace
from functools import partial

import torch
from transformers import MixtralConfig, MixtralForCausalLM

from sftcli.config.schema.adapter import AdapterSettings
from sftcli.config.schema.training import OptimizerName, TrainingSettings
from sftcli.modeling.activations import checkpoint_activations
from sftcli.modeling.adapter.adapter import add_adapter
from sftcli.modeling.kernels.document_attention import attend_by_document
from sftcli.modeling.kernels.fuse import fuse_layers
from sftcli.training.distributed.group import Group
from sftcli.training.distributed.traffic import (
    Traffic,
    Weight,
    adafactor_update_bytes,
    muon_update_bytes,
    replicated_traffic,
    sharded_traffic,
)
from sftcli.training.embeddings import embedding_names
from sftcli.training.loss import response_nll_sum
from sftcli.training.optim.optimizer import make_optimizer
from sftcli.training.trainer import Trainer
from sftcli.training.weights.sharded import ShardedWeights, layers_of
from tests.support.recording import MemoryStore
from tests.support.tiny_modern import tiny_modern
from tests.support.training import CPU, build_trainer, tiny_llama

STEPS = 3


def settings(**changes: object) -> TrainingSettings:
    values: dict[str, object] = {
        "max_steps": STEPS,
        "batch_size": 6,
        "micro_batch_size": 2,
        "learning_rate": 1e-3,
        "warmup_steps": 0,
        "precision": "fp32",
        "packing": "off",
    }
    return TrainingSettings(**(values | changes))


def build_model(kind: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if kind == "modern":
        return tiny_modern().train()
    if kind == "experts":
        config = MixtralConfig(**tiny_llama().config.to_diff_dict() | {"num_local_experts": 4})
        model = MixtralForCausalLM(config).train()
        add_adapter(model, AdapterSettings(kind="lora", rank=2, experts=True))
        return model
    model = tiny_llama(tie=kind not in ("untied", "lora"))  # no adapter on a tied head
    if kind == "fused":
        fuse_layers(model)
    if kind == "lora":
        add_adapter(model, AdapterSettings(kind="lora", rank=4, target_modules=("auto", "lm_head")))
    if kind == "checkpointing":
        checkpoint_activations(model)
    if kind == "packed":
        assert attend_by_document(model)
    return model


def trainer_of(
    group: Group, kind: str, *, shards: int = 0, dtype: torch.dtype = torch.float32, **changes: object
) -> Trainer:
    """Return a trainer that shares out the weights among ``shards`` each of ``group``; 0 for all, 1 for whole ones."""
    model = build_model(kind)
    if kind == "packed":
        changes |= {"packing": "on", "micro_batch_tokens": 48}
    trainer = build_trainer(
        settings=settings(**changes), store=MemoryStore(), emit=lambda _: None, model=model, dtype=dtype
    )
    trainer.group = group
    shards = shards or group.size
    if shards > 1:
        trainer.weights = ShardedWeights(
            build_model(kind), compute_dtype=dtype, group=group, shards=shards, device=CPU
        )
        trainer.optimizer = make_optimizer(
            trainer.weights.masters,
            trainer.settings,
            embeddings=embedding_names(trainer.weights.model),
            shard_group=trainer.weights.shard_group,
        )
        trainer.batch_loss = trainer.weights.gathered(partial(response_nll_sum, trainer.weights.model))
    return trainer


def predicted_traffic(trainer: Trainer, group: Group, *, micro_batches: int, exchanges: int = 1) -> Traffic:
    """Return the traffic of a step of ``trainer``; ``micro_batches`` are those of each process."""
    model = trainer.weights.model
    if not isinstance(trainer.weights, ShardedWeights):
        return replicated_traffic(map(_weight, trainer.weights.masters.values()))
    layers = [list(layer.parameters()) for layer in layers_of(model)]
    inner = {id(parameter) for layer in layers for parameter in layer}
    traffic = sharded_traffic(
        [[_weight(parameter) for parameter in layer] for layer in layers],
        [_weight(parameter) for parameter in model.parameters() if id(parameter) not in inner],
        shards=trainer.weights.shards,
        copies=group.size // trainer.weights.shards,
        micro_batches=micro_batches,
        compute_bytes=4,
        exchanges=exchanges,
    )
    return replace(traffic, updated=_updated(trainer, group))


def _updated(trainer: Trainer, group: Group) -> int:
    shards, masters = trainer.weights.shards, trainer.weights.masters
    match trainer.settings.optimizer:
        case OptimizerName.MUON:
            others = embedding_names(trainer.weights.model)
            matrices = [one for name, one in masters.items() if one.ndim == 2 and name not in others]
            return muon_update_bytes(map(_weight, matrices), shards=shards, rank=group.rank % shards)
        case OptimizerName.ADAFACTOR:
            return adafactor_update_bytes(map(_weight, masters.values()))
    return 0


def _weight(parameter: torch.nn.Parameter) -> Weight:
    return Weight(shape=tuple(parameter.shape), trains=parameter.requires_grad)
