"""How the fields of a record become the source that a model reads and the target that it writes.

A template is a text with the names of fields in braces: ``标题：{title}``. Of a source that is too long the
last field is cut, and no other. What stands before the first field of a target is its fixed opening, which
the model writes too, and which is taken off before text is shown or scored.

The templates belong to the model. They lie in its tokenizer_config.json, as a chat template does, so that
they go wherever the tokenizer goes: into checkpoints, adapters, merged and exported models.
"""

import dataclasses
import functools
import os
import re
from pathlib import Path
from typing import NamedTuple, Optional

from paddlenlp.utils.log import logger

from glm.errors import InputError, as_input_error, printable
from glm.files import read_json, take_known

DEFAULTS = {
    "source_template": "答案：{answer}，上下文：{context}",
    "target_template": "在已知答案的前提下，问题：{question}",
}
QUESTION_GENERATION = ("context", "answer", "question")
LONGEST = 10_000  # characters of a template
# What a record, and a line of the predictions file, has beside its fields.
OF_A_RECORD = ("id", "where")
OF_A_ROW = ("reference", "prediction", "score", "token_ids", "rougel", "candidates", "error")


class Template(NamedTuple):
    """A text with fields.

    Attributes:
        parts: texts and names of fields by turns; the first and the last are texts, which may be empty.
    """

    parts: tuple[str, ...]

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of the fields in their order."""
        return self.parts[1::2]

    def fill(self, record: dict) -> list:
        """Return ``parts`` with the values of the fields, which ``record`` has, in place of their names."""
        return [record[part] if index % 2 else part for index, part in enumerate(self.parts)]


class Templates(NamedTuple):
    """The templates of a model."""

    source: Template
    target: Template

    @property
    def fields(self) -> tuple[str, ...]:
        """The names of all fields, each once, in the order of the predictions file."""
        names = dict.fromkeys(self.source.fields + self.target.fields)
        return tuple(name for name in QUESTION_GENERATION if name in names) if self.ask else tuple(names)

    @property
    def ask(self) -> bool:
        """Whether all fields are question generation's, whose records are known in other forms too."""
        return {*self.source.fields, *self.target.fields} <= {*QUESTION_GENERATION}

    def get_reference(self, record: dict) -> Optional[str]:
        """Return the target behind its opening, or None where a field of it is not known."""
        _, *values = self.target.fill(record)
        return None if None in values else "".join(values)


def get_templates(tokenizer) -> Templates:
    """Return the templates that ``tokenizer`` has. Raises ValueError where a model's are none."""
    texts = {**DEFAULTS, **tokenizer.init_kwargs}
    return Templates(*(parse_template(name, texts[name]) for name in DEFAULTS))


@functools.lru_cache(maxsize=64)
def parse_template(name: str, text: str) -> Template:
    """Return the Template that ``text`` is, of the ``name`` source_template or target_template.

    Raises:
        ValueError: where it is none.

    Example: ``parse_template("target_template", "标题：{title}。").parts`` is ("标题：", "title", "。").
    """
    text.encode()  # half a character, which JSON may hold, is a ValueError
    if len(text) > LONGEST:
        raise ValueError(f"{name} has more than {LONGEST:,} characters")
    template = Template(tuple(re.split(r"\{([^{}]*)\}", text)))
    for part in template.parts[::2]:
        if brace := re.search("[{}]", part):
            raise ValueError(f"{name} has a {brace[0]} without its other half: write a field as {{name}}")
    if not template.fields:
        raise ValueError(f"{name} has no field: write one as {{name}}")
    taken = OF_A_RECORD + (OF_A_ROW if name == "source_template" else ())
    for field in template.fields:
        if not field.strip():
            raise ValueError(f"{name} has a field without a name: write one as {{name}}")
        if field in taken:
            raise ValueError(f"{name} has the field {{{field}}}, a name that the predictions file needs")
    return template


DEFAULT_TEMPLATES = Templates(*(parse_template(name, text) for name, text in DEFAULTS.items()))


def choose_templates(tokenizer, data_args, checkpoint: Optional[Path] = None):
    """Let ``tokenizer`` have the templates of this run: the flags', else the checkpoint's, else the model's.

    Args:
        data_args (DataArguments): the flags.
        checkpoint: the folder of the checkpoint that the run goes on from, or None.

    Returns:
        DataArguments, with the templates that are in effect.

    Raises:
        InputError: where one is none, or --truncation does not fit them.
    """
    saved, owner = tokenizer.init_kwargs, "the model"
    if checkpoint and os.path.lexists(checkpoint / "tokenizer_config.json"):
        owner = f"{checkpoint}/tokenizer_config.json"
        with as_input_error(f"{owner} can't be read", "give another checkpoint"):
            saved = take_known(read_json(owner), dict.fromkeys(DEFAULTS, (str,)))
            for name, text in saved.items():
                parse_template(name, text)
    chosen = {}
    for name, default in DEFAULTS.items():
        given, found = getattr(data_args, name), saved.get(name)
        if None not in (given, found) and given != found:
            logger.warning(f"--{name} takes the place of that of {owner}, {printable(found, 300)!r}")
        chosen[name] = next(text for text in (given, found, default) if text is not None)
        with as_input_error(f"--{name} can't be used", "change it"):
            parse_template(name, chosen[name])
    tokenizer.init_kwargs.update(chosen)
    if data_args.truncation == "answer" and "answer" not in get_templates(tokenizer).source.fields[:-1]:
        raise InputError(
            "--truncation answer keeps what stands around the answer in the source's last field, and "
            f"--source_template has no {{answer}} before that: {printable(chosen['source_template'], 300)}"
        )
    return dataclasses.replace(data_args, **chosen)
