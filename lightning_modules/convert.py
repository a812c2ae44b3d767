"""Write a checkpoint again in another layout, bit for bit, and show that it is the same model.

    python -m lightning_modules.convert source=PATH target=DIR layout=ours|hf|state-spaces [key=value ...]

PATH is a run directory, a .ckpt, a directory written by save_model, weights that DeepSpeed has consolidated,
or a published Mamba-2: a directory in the state-spaces layout or in that of transformers' Mamba2ForCausalLM.

    python -m lightning_modules.convert source=models/mamba2-130m target=models/ours
    python -m lightning_modules.convert source=runs/demo target=models/demo-hf layout=hf max_shard_size=1GB

The source is read as data only: none of its code runs. The target appears whole or not at all, with the
tokenizer, where one is known, and parity.json: a checksum of the weights, and how far logits on fixed tokens
differ between the source, the target read again and, where one of the two has its layout, transformers.
layout=hf adds README.md, a model card from what the run measured.
"""

from conf.conversion import ConvertConfig
from conf.load import from_command_line, user_errors
from lightning_modules.saying import say
from lightning_modules.termination import Termination


def main(argv: list[str] | None = None) -> None:
    config = from_command_line(ConvertConfig, __doc__ or "", argv)
    with user_errors(), Termination():
        from lightning_modules.conversion.run import convert  # imports torch: only for a config that holds

        files = convert(config)["files"]
        say(f"{config.target}: {', '.join(files)}, parity.json")


if __name__ == "__main__":
    main()
