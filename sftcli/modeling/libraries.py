"""Silences transformers and related libraries at the terminal."""

import logging

from transformers.utils import logging as transformers_logging


def quiet_libraries() -> None:
    """Turn off progress bars and keep warnings and logs of libraries off the terminal.

    They still reach a handler on the root logger, such as that of a log file. May be called any number of times.
    """
    transformers_logging.disable_progress_bar()
    logging.captureWarnings(capture=True)
    for name in ("transformers", "huggingface_hub", "accelerate", "gguf", "bitsandbytes", "lm_eval", "py.warnings"):  # fmt: skip
        logger = logging.getLogger(name)
        for handler in [*logger.handlers]:
            if type(handler) is logging.StreamHandler:
                logger.removeHandler(handler)
        if not logger.handlers:
            logger.addHandler(logging.NullHandler())
        logger.propagate = (
            logging.getLogger().hasHandlers()
        )  # else logging's last resort would write to stderr
