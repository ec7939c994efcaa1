"""Laws of the Modern LLM decoder: reference outputs, cached equals uncached, packed equals separate."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sftcli.data.batches.batch import collate
from sftcli.modeling.decoding.decoder import choose_decoder
from sftcli.modeling.formats.pt_file import read_pt, write_model_folder, write_pt
from sftcli.modeling.load import load_model
from sftcli.training.loss import plain_nll_sum, response_nll_sum
from tests.support.decoding import answers
from tests.support.tiny_modern import tiny_modern
from tests.support.training import PAD_ID, random_examples

FIXTURES = Path(__file__).parents[3] / "shared/fixtures/modern_llm"
KINDS = {
    "sinks": {},
    "sinks-grouped": {"use_gqa": True, "gqa_groups": 2},
    "plain": {"use_attention_sinks": False},
    "plain-grouped": {"use_attention_sinks": False, "use_gqa": True, "gqa_groups": 2},
    "sinks-norope": {"use_rope": False},
    "untied": {"tie_word_embeddings": False},
}
kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.mark.parametrize("name", ["tiny-gqa", "tiny-sinks"])
@pytest.mark.parametrize("rewritten", [False, True])
def test_logits_and_loss_are_those_of_the_original_program(name, rewritten, tmp_path):
    source = FIXTURES / f"{name}.pt"
    if not source.is_file():
        pytest.skip("the shared fixtures are not here")
    checkpoint = read_pt(source)
    write_model_folder(checkpoint, tmp_path)
    model = load_model(tmp_path, dtype=torch.float32, device=torch.device("cpu"))
    if rewritten:
        group = {"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.01}
        write_pt(tmp_path / "again.pt", config=model.config, weights=dict(model.named_parameters()), optimizer={},
                 group=group, step=3, run_name="again")  # fmt: skip
        again = read_pt(tmp_path / "again.pt")
        assert again.config == checkpoint.config
        assert again.model_state.keys() == checkpoint.model_state.keys()
        folder = tmp_path / "again"
        folder.mkdir()
        write_model_folder(again, folder)
        model = load_model(folder, dtype=torch.float32, device=torch.device("cpu"))
    expected = load_file(FIXTURES / f"{name}.expected.safetensors")
    mask = expected["attention_mask"]
    with torch.no_grad():
        output = model(input_ids=expected["input_ids"], attention_mask=mask, labels=expected["labels"])
    seen = mask.bool()
    torch.testing.assert_close(output.logits[seen], expected["logits"][seen], atol=1e-5, rtol=0)
    torch.testing.assert_close(output.loss.reshape(1), expected["loss"], atol=1e-5, rtol=0)


@kinds
def test_cached_greedy_equals_uncached_token_by_token(kind):
    model = tiny_modern(**KINDS[kind])
    prompts = [[5, 9, 300, 41, 7], [11, 3], [400, 20, 20, 31, 77, 8, 12]]
    cached = answers(choose_decoder(model), prompts, max_new_tokens=12)
    for prompt, answer in zip(prompts, cached, strict=True):
        ids = [*prompt]
        for _ in range(12):
            with torch.no_grad():
                ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        assert ids[len(prompt) :] == answer.ids


@kinds
def test_packed_documents_equal_separate_ones(kind):
    model = tiny_modern(**KINDS[kind])
    documents = [
        torch.randint(3, 500, (1, size), generator=torch.Generator().manual_seed(size)) for size in (7, 1, 12)
    ]
    positions = torch.cat([torch.arange(part.shape[1]) for part in documents])[None]
    with torch.no_grad():
        packed = model(input_ids=torch.cat(documents, dim=1), position_ids=positions, use_cache=False).logits
        apart = torch.cat([model(input_ids=part, use_cache=False).logits for part in documents], dim=1)
    torch.testing.assert_close(packed, apart, atol=2e-5, rtol=0)


@kinds
def test_lean_loss_on_padded_rows_equals_the_sum_over_single_rows(kind):
    model, rows = tiny_modern(**KINDS[kind]), random_examples(5)
    together = collate(rows, example_ids=range(5), pad_id=PAD_ID)
    with torch.no_grad():
        alone = sum(plain_nll_sum(model, collate([row], example_ids=[0], pad_id=PAD_ID)) for row in rows)
        torch.testing.assert_close(response_nll_sum(model, together), alone, atol=0, rtol=1e-5)


@kinds
def test_gradient_checkpointing_changes_no_gradient(kind):
    batch = collate(random_examples(3), example_ids=range(3), pad_id=PAD_ID)
    gradients = []
    for checkpointing in (False, True):
        model = tiny_modern(**KINDS[kind]).train()
        if checkpointing:
            newer = getattr(model, "activation_checkpointing_enable", None)
            (newer or model.gradient_checkpointing_enable)({"use_reentrant": False})
        response_nll_sum(model, batch).backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))
