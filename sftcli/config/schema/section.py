"""What every section of settings shares: strict types, no unknown keys, no secrets."""

import re
from typing import Annotated, get_args

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

Text = Annotated[str, Field(min_length=1)]


class Section(BaseModel):
    """Base of the sections: unknown keys are errors, values do not change after validation."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, hide_input_in_errors=True, allow_inf_nan=False, validate_default=True
    )

    @field_validator("*", mode="before")
    @classmethod
    def _type_is_meant(cls, value: object, info: ValidationInfo) -> object:
        """Refuse what pydantic would convert: ``true`` for 1, ``"20"`` for 20, 1 for ``true``."""
        annotation = cls.model_fields[info.field_name or ""].annotation
        kinds = get_args(annotation) or (annotation,)
        is_bool = isinstance(value, bool)
        if (bool in kinds and not is_bool and value is not None) or (
            (int in kinds or float in kinds) and (is_bool or isinstance(value, str))
        ):
            raise PydanticCustomError("wrong_type", "wrong type")
        return value

    @field_validator("*", mode="after")
    @classmethod
    def _holds_no_password(cls, value: object) -> object:
        """Refuse an address with a user name or password: settings are written to disk and shown."""
        texts = value if isinstance(value, tuple) else (value,)
        if any(isinstance(text, str) and re.search(r"://[^/\s]*@", text) for text in texts):
            raise ValueError(
                "an address must not hold a user name or password; use `hf auth login` or HF_TOKEN"
            )
        return value
