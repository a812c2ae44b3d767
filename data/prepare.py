"""Tokenise the documents of a training run, and tell what its filters keep of them; nothing is trained.

    python -m data.prepare CONFIG.yaml [more.yaml] [key=value ...]

Takes what `lightning_modules.train` takes; only section `data` counts. A training run does it before its
first step, while the other ranks wait: prepare a large corpus beforehand, on a machine without a GPU, with
HF_DATASETS_CACHE on a disk that both see. Killed, it goes on where it was.
"""

from conf.load import from_command_line, user_errors
from conf.schema import TrainConfig, require
from conf.tasks import IN_TEXT


def main() -> None:
    assert __doc__ is not None
    config = from_command_line(TrainConfig, __doc__)
    with user_errors():
        readers = ("documents", *IN_TEXT)
        remedy = f"reads no documents, nothing is to be tokenised; {', '.join(readers)} do"
        require(config.data.name in readers, "data.name", config.data.name, remedy)
        from data.opened import Documents
        from data.tokenizers import load_tokenizer

        for line in Documents(config.data, load_tokenizer(config.data.tokenizer)).prepare():
            print(line, flush=True)


if __name__ == "__main__":
    main()
