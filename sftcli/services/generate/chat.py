"""A conversation with a model: turns, their history, and a record of it that can be trained on."""

import json
from dataclasses import dataclass, field
from pathlib import Path

from sftcli import storage
from sftcli.config.schema.run import SamplingSettings
from sftcli.data.conversations.messages import Message
from sftcli.events import EventSink, StopFlag
from sftcli.modeling.decoding.decode import require_positions
from sftcli.services.generate.answerer import Answerer, Completion
from sftcli.services.generate.remote import ServerAnswerer


@dataclass(slots=True)
class Chat:
    """A chat session."""

    answerer: Answerer | ServerAnswerer
    sampling: SamplingSettings
    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def ask(self, text: str, emit: EventSink, stop: StopFlag) -> Completion:
        """Add a turn and return its answer, which is emitted as it comes. A refused prompt leaves the history as it was.

        Raises:
            DataError: The conversation is longer than the positions of the model.
        """
        turns = [*self.turns, Message(role="user", content=text)]
        question = self.answerer.question([*self._opening(), *turns], seed=(len(turns),))
        require_positions(
            [len(question.ids)],
            self.answerer.positions,
            what="the conversation",
            hint="/reset forgets it" if self.turns else "ask less at once",
        )
        self.answerer.require_memory(question, row="the conversation")
        ((_, completion),) = self.answerer.answer([question], self.sampling, stop, emit=emit)
        self.turns = [*turns, Message(role="assistant", content=completion.text)]
        return completion

    def reset(self) -> None:
        """Forget all turns; the system message stays."""
        self.turns = []

    def save(self, path: Path) -> None:
        """Append the conversation to ``path`` as one line of JSON, in the form that ``train`` reads.

        Raises:
            OutputError, StorageError: The file cannot be written.
        """
        messages = [{"role": turn.role, "content": turn.content} for turn in [*self._opening(), *self.turns]]
        with storage.writing(path, "name another file"), storage.disk.append(path) as file:
            storage.append_line(file, json.dumps({"messages": messages}, ensure_ascii=False))

    def _opening(self) -> list[Message]:
        return [Message(role="system", content=self.system)] if self.system else []
