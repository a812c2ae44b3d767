"""Settings of the data bench."""

from dataclasses import dataclass

from conf.documents import DocumentsConfig
from conf.fields import option, require, require_at_least, section


@dataclass(kw_only=True)
class DataBenchConfig:
    """How fast documents are tokenised and read."""

    tokenizer: str = option("bytes", "bytes, or a Hugging Face tokenizer folder or name")
    train_length: int = option(8192, "tokens a row")
    batch_size: int = option(64, "rows a step; a stream has a lane for each")
    steps: int = option(20, "steps read of each source")
    need: float = option(132_000, "tokens/s that training reads, to compare with: 370M on an H200 by default")
    json: str | None = option(None, "also write the numbers here")
    print_config: bool = option(False, "print the resolved config and stop")
    documents: DocumentsConfig = section(DocumentsConfig)

    def __post_init__(self) -> None:
        require_at_least("config", self, 1, "train_length", "batch_size", "steps", "need")
        single = not self.documents.mixture
        require(single, "documents.mixture", "...", "the bench reads one source: documents.source=PATH")
