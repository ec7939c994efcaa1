"""Asks one model as one program does. Runs with the Python of that program's environment, without a line of this package.

    python ask.py JOB.json RESULT.json

The job: ``program`` ("transformers" or "llama.cpp"), ``model`` (a folder or file), ``base`` (of an adapter), ``prompts``
(lists of messages), ``texts`` (to be cut into tokens), ``long_text`` (whose loss is wanted), ``most`` (tokens of an answer).
All is computed in float32, one prompt at a time and greedily, with the stop tokens that the model's own files name.
"""

import json
import sys
from pathlib import Path


def ask_transformers(job):
    """Return what transformers, or peft where there is a base, makes of the job."""
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    folder = job["base"] or job["model"]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if job["base"]:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, job["model"])
        model.generation_config = transformers.GenerationConfig.from_pretrained(job["model"])
    model.eval()
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    prompts, answers, margins = [], [], []
    for messages in job["prompts"]:
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(
            **inputs,
            max_new_tokens=job["most"],
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        start = inputs["input_ids"].shape[1]
        ids = made.sequences[0, start:].tolist()
        top = [logits[0].topk(2).values for logits in made.logits]
        prompts.append(inputs["input_ids"][0].tolist())
        answers.append(until(ids, ends))
        margins.append([float(first - second) for first, second in top])
    result = {"prompts": prompts, "answers": answers, "margins": margins}
    result["texts"] = [tokenizer.decode(answer, skip_special_tokens=False) for answer in answers]
    result["tokens"] = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in job["texts"]]
    ids = torch.tensor([tokenizer(job["long_text"], add_special_tokens=False)["input_ids"]])
    with torch.no_grad():
        result["loss"] = float(model(input_ids=ids, labels=ids).loss)
    return result


def ask_llama(job):
    """Return what llama.cpp makes of the job."""
    import llama_cpp
    import numpy
    from llama_cpp.llama_chat_format import Jinja2ChatFormatter

    model = llama_cpp.Llama(
        job["model"], n_ctx=4096, n_batch=4096, logits_all=True, verbose=False,
        type_k=llama_cpp.GGML_TYPE_F32, type_v=llama_cpp.GGML_TYPE_F32,
    )  # fmt: skip
    vocab = llama_cpp.llama_model_get_vocab(model.model)

    def text_of(token):
        return model.detokenize([token], special=True).decode() if token >= 0 else ""

    render = Jinja2ChatFormatter(
        template=model.metadata["tokenizer.chat_template"],
        eos_token=text_of(model.token_eos()),
        bos_token=text_of(model.token_bos()),
    )
    prompts, answers = [], []
    for messages in job["prompts"]:
        ids = model.tokenize(render(messages=messages).prompt.encode(), add_bos=False, special=True)
        answer = []
        for token in model.generate(ids, temp=0.0, top_k=1, repeat_penalty=1.0):
            if len(answer) == job["most"] or llama_cpp.llama_vocab_is_eog(vocab, token):
                break
            answer.append(token)
        prompts.append(ids)
        answers.append(answer)
    result = {"prompts": prompts, "answers": answers}
    result["tokens"] = [model.tokenize(text.encode(), add_bos=False, special=True) for text in job["texts"]]
    ids = model.tokenize(job["long_text"].encode(), add_bos=False, special=True)
    model.reset()
    model.eval(ids)
    logits = numpy.array(model.scores[: len(ids) - 1], dtype=numpy.float64)
    high = logits.max(axis=1, keepdims=True)
    total = high[:, 0] + numpy.log(numpy.exp(logits - high).sum(axis=1))
    result["loss"] = float((total - logits[numpy.arange(len(ids) - 1), ids[1:]]).mean())
    return result


def until(ids, ends):
    """Return ``ids`` up to the first of ``ends``."""
    return next((ids[:place] for place, token in enumerate(ids) if token in ends), ids)


if __name__ == "__main__":
    asked = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {"transformers": ask_transformers, "llama.cpp": ask_llama}[asked["program"]](asked)
    Path(sys.argv[2]).write_text(json.dumps(found), encoding="utf-8")
