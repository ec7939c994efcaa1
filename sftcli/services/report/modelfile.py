"""A ``Modelfile`` for Ollama beside a GGUF file.

A chat template of a shape below is written in Ollama's own language; of any other none is written, and Ollama takes one of its own
that looks like the template in the file, or runs that itself, as versions since 0.30 do where none looks like it.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sftcli.errors import SftError

Turns = Sequence[tuple[str, str]]
_TURNS: Turns = (("user", "First question?"), ("assistant", "First answer."), ("user", "Second question?"))
_SYSTEM = ("system", "Be brief.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A shape of chat templates: what stands around a turn and before an answer. ``{}`` is the role."""

    before: str
    after: str

    def text(self, turns: Turns) -> str:
        """Return the prompt for an answer to ``turns``."""
        return "".join(
            self.before.format(role) + content + self.after for role, content in turns
        ) + self.before.format("assistant")

    @property
    def template(self) -> str:
        """The same in the language of Ollama (Go's text/template)."""
        turn = self.before.format("{{ .Role }}") + "{{ .Content }}" + self.after
        return f"{{{{- range .Messages }}}}{turn}{{{{ end }}}}{self.before.format('assistant')}"


SHAPES: Mapping[str, Shape] = {
    "ChatML": Shape(before="<|im_start|>{}\n", after="<|im_end|>\n"),
    "Llama 3": Shape(before="<|start_header_id|>{}<|end_header_id|>\n\n", after="<|eot_id|>"),
}


def find_shape(render: Callable[[Turns], str], bos: str) -> tuple[Shape, str] | None:
    """Return the shape that renders every example as ``render`` does, and the system text of a prompt without one."""
    try:
        texts = render((_SYSTEM, *_TURNS)), render(_TURNS)
    except SftError:
        return None
    for shape in SHAPES.values():
        # The token before all texts is added by who reads the file; some models have one that begins each turn too.
        is_added = not shape.before.startswith(bos)
        with_system, without = (text.removeprefix(bos if is_added else "") for text in texts)
        head, tail = shape.before.format("system"), shape.after + shape.text(_TURNS)
        if with_system != shape.text((_SYSTEM, *_TURNS)):
            continue
        if without == shape.text(_TURNS):
            return shape, ""
        if without.startswith(head) and without.endswith(tail):
            return shape, without[len(head) : len(without) - len(tail)]
    return None


def modelfile(
    gguf: str, *, shape: Shape | None, system: str, stops: Sequence[str], sampling: Mapping[str, float]
) -> str:
    """Return the text of a ``Modelfile``; ``sampling`` are parameters as Ollama names them."""
    lines = [f"FROM ./{gguf}"]
    if shape is not None:
        lines.append(f'TEMPLATE """{shape.template}"""')
    if system:
        lines.append(f'SYSTEM """{system}"""')
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling.items()]
    lines += [f'PARAMETER stop "{text}"' for text in stops]
    return "\n".join(lines) + "\n"
