"""Text encoders: a small one trained with the toy checkpoint, and UMT5 for Wan weights.

Both offer `encode(list[str]) -> (embeddings [B, L, D], lens [B])` with zeros behind each text's last token, `dim`,
`max_tokens`, and `unknown(prompt)`: the words of a prompt that mean nothing to them.
"""

from __future__ import annotations

import dataclasses
import html
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import checks, extras
from .checkpoint import CheckpointError, check_finite, check_known, read_headers, read_json, unfilled, wan_weights
from .safety import limits, policy

_PAD, _UNKNOWN, _NULL = 0, 1, 2
_SPECIALS = ("<pad>", "<unk>", "<null>")
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def check_prompt(prompt: object, name: str = "prompt") -> str:
    """The prompt itself. Raises TypeError or ValueError unless it is text with a word, of at most `Limits.characters`
    characters; `safety.policy.PolicyError` where the policy refuses it."""
    if not isinstance(prompt, str):
        raise TypeError(f"{name} must be a str, got {type(prompt).__name__}")
    if len(prompt) > (most := limits.current().characters):
        raise ValueError(f"{name} has {len(prompt)} characters; at most {most} are accepted, so shorten it")
    if not _WORD.search(prompt):
        raise ValueError(f"{name} holds no word: {prompt[:40]!r}; say what to show, such as 'a red circle bounces'")
    policy.check(prompt, name)
    return prompt


def split_words(prompt: str) -> list[str]:
    """Lower-cased words, without punctuation."""
    return _WORD.findall(prompt.lower())


@dataclasses.dataclass(frozen=True)
class WordTextConfig:
    """Shape and vocabulary of a `WordTextEncoder`. `words` are in the order of their embeddings, after the
    specials."""

    words: tuple[str, ...]
    dim: int = 64
    layers: int = 1
    heads: int = 4
    max_tokens: int = 32

    def __post_init__(self) -> None:
        words = checks.several("words", self.words)
        single = all(isinstance(word, str) and split_words(word) == [word] for word in words)
        if not words or not single or len(set(words)) != len(words):
            raise ValueError("words must be distinct single lower-case words, at least one")
        object.__setattr__(self, "words", words)
        for name, least, most in (("dim", 2, 8192), ("layers", 0, 64), ("heads", 1, 64), ("max_tokens", 1, 1024)):
            checks.whole(name, getattr(self, name), least, most)
        if self.dim % self.heads:
            raise ValueError(f"dim must be a multiple of heads, got {self.dim} and {self.heads}")


class _Layer(nn.Module):
    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_attention, self.norm_mlp = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:                       # [B, L, D], [B, L] bool
        q, k, v = self.qkv(self.norm_attention(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None, None, :])   # [B, H, L, E]
        x = x + self.out(y.transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm_mlp(x))


class WordTextEncoder(nn.Module):
    """Words of a closed vocabulary, placed by a learnt position, through a small transformer.

    The empty prompt stands for "no prompt" (classifier-free guidance) and is one token of its own. A word outside the
    vocabulary becomes <unk>, which training has shown to the model by forgetting words at random.
    """

    masks_padding = True

    def __init__(self, config: WordTextConfig) -> None:
        super().__init__()
        self.config = config
        self.dim, self.max_tokens = config.dim, config.max_tokens
        self._ids = {word: index for index, word in enumerate(config.words, len(_SPECIALS))}
        self.embedding = nn.Embedding(len(_SPECIALS) + len(config.words), config.dim)
        self.position = nn.Parameter(torch.empty(config.max_tokens, config.dim).normal_().mul_(0.02))
        self.layers = nn.ModuleList(_Layer(config.dim, config.heads) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.dim)

    @property
    def words(self) -> tuple[str, ...]:
        """All words that it knows."""
        return self.config.words

    def unknown(self, prompt: str) -> list[str]:
        """The words of `prompt` that the vocabulary lacks, each once, in order."""
        return [word for word in dict.fromkeys(split_words(prompt)) if word not in self._ids]

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Token numbers `[B, L]`, int64, padded with 0 to the longest prompt. A prompt of too many words raises
        ValueError."""
        rows = [[self._ids.get(word, _UNKNOWN) for word in split_words(prompt)] or [_NULL] for prompt in prompts]
        longest = max(map(len, rows))
        if longest > self.max_tokens:
            raise ValueError(f"prompt has {longest} words; this encoder takes {self.max_tokens} at most: shorten it")
        return torch.tensor([row + [_PAD] * (longest - len(row)) for row in rows])

    def forget(self, ids: Tensor, *, words: float, prompts: float, generator: torch.Generator) -> Tensor:
        """Training noise: each word becomes <unk> with chance `words`, each whole prompt the empty one with chance
        `prompts`."""
        lost = torch.rand(ids.shape, generator=generator, dtype=torch.float32) < words
        ids = torch.where(lost & (ids >= len(_SPECIALS)), _UNKNOWN, ids)
        dropped = torch.rand(len(ids), generator=generator, dtype=torch.float32) < prompts
        empty = torch.full_like(ids, _PAD)
        empty[:, 0] = _NULL
        return torch.where(dropped[:, None], empty, ids)

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token numbers `[B, L]` -> embeddings `[B, L, D]`, zero behind each text, and lens `[B]` int32."""
        seen = ids != _PAD                                                       # [B, L]
        x = self.embedding(ids) + self.position[: ids.shape[1]]                  # [B, L, D]
        for layer in self.layers:
            x = layer(x, seen)
        return self.norm(x) * seen[..., None], seen.sum(1, dtype=torch.int32)

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, L, D]` and lens `[B]` of `prompts`, on the encoder's device. "" is the empty prompt."""
        return self(self.tokenize(prompts).to(self.position.device))


class UMT5TextEncoder:
    """Wan's text encoder: the encoder half of UMT5 and its tokenizer, from local folders through `transformers`.

    Prompts are cleaned as Wan does (HTML entities, white space), cut at 512 tokens, and embeddings behind a text's
    end are zero; the transformer sees all 512. Nothing is downloaded: a missing folder raises `CheckpointError`.
    """

    max_tokens = 512
    masks_padding = False
    words = ()  # pieces of words spell every one

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.dim = model.config.d_model

    @classmethod
    def from_directory(cls, path: str | Path, *, dtype: torch.dtype | None = None) -> UMT5TextEncoder:
        """Reads `path/text_encoder` and `path/tokenizer` of a Wan directory."""
        with extras.named("the text encoder of Wan weights"):
            from transformers import AutoTokenizer, UMT5EncoderModel
        folders = {name: Path(path) / name for name in ("text_encoder", "tokenizer")}
        for name, folder in folders.items():
            if not folder.is_dir():
                raise CheckpointError(f"{folder} is missing: a Wan checkpoint keeps its {name.replace('_', ' ')} there")
        where = folders["text_encoder"]
        check_sizes(where)
        with _damaged(path):
            model, info = UMT5EncoderModel.from_pretrained(
                where, local_files_only=True, use_safetensors=True, dtype=dtype or "auto", output_loading_info=True
            )
            tokenizer = AutoTokenizer.from_pretrained(folders["tokenizer"], local_files_only=True)
        if missing := sorted(info["missing_keys"]):
            raise CheckpointError(f"{where} lacks {len(missing)} tensors of its text encoder (first: {missing[0]!r})")
        with _damaged(path):
            check_finite(model.state_dict(), str(where))
        return cls(model.eval(), tokenizer)

    def to(self, device: torch.device | str) -> UMT5TextEncoder:
        self.model.to(device)
        return self

    def unknown(self, prompt: str) -> list[str]:
        """Nothing: subword tokens spell every word."""
        return []

    @torch.no_grad()
    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Embeddings `[B, 512, D]` and lens `[B]` of `prompts`."""
        cleaned = [re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip() for prompt in prompts]
        with _damaged(self.tokenizer.name_or_path):
            tokens = self.tokenizer(
                cleaned, padding="max_length", max_length=self.max_tokens, truncation=True, return_tensors="pt"
            )
            shape = tuple(tokens.input_ids.shape)
        if shape != (len(prompts), self.max_tokens) or tokens.input_ids.max() >= self.model.config.vocab_size:
            raise CheckpointError(
                f"{self.tokenizer.name_or_path} gives {shape} tokens, up to number {int(tokens.input_ids.max())}; the "
                f"text encoder takes {self.max_tokens} of {self.model.config.vocab_size}: they are of different models"
            )
        mask = tokens.attention_mask.to(self.model.device)
        states = self.model(tokens.input_ids.to(self.model.device), mask).last_hidden_state
        return states * mask[..., None], mask.sum(1, dtype=torch.int32)


@contextmanager
def _damaged(path: str | Path) -> Iterator[None]:
    """Whatever goes wrong inside as a `CheckpointError`: transformers raises many kinds for damaged files."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of the tokenizer's Rust is no Exception
        raise CheckpointError(f"the text encoder in {path} cannot be read: {error}") from error


def check_sizes(folder: Path) -> list[str]:
    """Raises `CheckpointError` unless a config's sizes are those of its weights: transformers allocates them first.

    From the headers of the files, of which no weights are read. Returns the names that nothing reads.
    """
    with extras.named("the text encoder of Wan weights"):
        from transformers import UMT5Config, UMT5EncoderModel

    config = read_json(folder / "config.json")
    asked = config.get("num_layers")
    found = {name: held.shape for name, held in read_headers(wan_weights(folder)).items()}
    names = (name.split(".") for name in found)
    held = len({name[2] for name in names if name[:2] == ["encoder", "block"] and len(name) > 2})
    if type(asked) is not int or asked != held:
        raise CheckpointError(f"{folder / 'config.json'}: num_layers must be {held}, as in the weights; got {asked!r}")
    with _damaged(folder.parent), unfilled():
        wanted = UMT5EncoderModel(UMT5Config.from_pretrained(folder, local_files_only=True)).state_dict()
    tied = {"shared.weight", "encoder.embed_tokens.weight"}  # of which a file keeps one or both
    spared = tied - found.keys() if tied & found.keys() else ()
    needed = {name: tuple(t.shape) for name, t in wanted.items() if name not in spared}
    unread = check_known(needed, found, str(folder))
    buckets, far = config.get("relative_attention_num_buckets", 32), config.get("relative_attention_max_distance", 128)
    try:  # half of the buckets are of one direction, and half of these are one distance each
        checks.whole("relative_attention_num_buckets", buckets, 4, 4096)
        checks.whole("relative_attention_max_distance", far, buckets // 4 + 1, 2**20)
        checks.number("dropout_rate", config.get("dropout_rate", 0.1), 0, 1)  # of NaN torch speaks in the forward only
    except ValueError as error:
        raise CheckpointError(f"{folder / 'config.json'}: {error}") from None
    return unread
