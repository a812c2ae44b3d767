"""Text from a checkpoint, printed as it is made. What was read is a state of fixed size: a token costs the
same after a thousand tokens as after a million.

    python -m lightning_modules.generate checkpoint=PATH prompt=TEXT [key=value ...]

PATH is a run directory, a .ckpt file, or a directory written by save_model. Examples:

    python -m lightning_modules.generate checkpoint=runs/demo prompt="The passkey is"
    python -m lightning_modules.generate checkpoint=runs/demo prompt="Once upon" temperature=0.8 top_p=0.95
    python -m lightning_modules.generate checkpoint=runs/demo prompt_file=prompts.jsonl 'stop=["\\n\\n"]'
    python -m lightning_modules.generate checkpoint=runs/demo prompt=Hello \\
        mitigation.name=forget_more mitigation.alpha_scale=0.999

A long document is read once and questioned many times:

    python -m lightning_modules.generate checkpoint=runs/demo prompt_file=document.txt \\
        max_new_tokens=0 save_state=document.state
    python -m lightning_modules.generate checkpoint=runs/demo state=document.state prompt="Who came?"

Without temperature every token is the likeliest. Standard output holds the text and nothing else; of several
prompts a line of JSON each, {"prompt": 0, "text": ..., "tokens": ..., "finish": "end", "stop" or "length"},
in the order in which they end. Progress and speed go to standard error. See docs/generation.md.
"""

from conf.generate_schema import GenerateConfig
from conf.load import from_command_line, user_errors
from lightning_modules.generation.prompts import read_texts
from lightning_modules.saying import discard_output
from lightning_modules.termination import Termination


def main(argv: list[str] | None = None) -> None:
    config = from_command_line(GenerateConfig, __doc__ or "", argv, verbatim="prompt")
    with user_errors(), Termination():
        texts = read_texts(config)
        # Imports torch: only for a config that holds.
        from lightning_modules.generation.run import run

        try:
            run(config, texts)
        except BrokenPipeError:  # whoever read the text has seen enough
            discard_output()
            if config.save_state is not None:
                raise ValueError(
                    f"save_state={config.save_state}: not written: standard output was closed before the "
                    "last token; read it to the end"
                ) from None


if __name__ == "__main__":
    main()
