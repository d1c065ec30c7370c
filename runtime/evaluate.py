"""Command line of `python -m runtime.evaluate`, nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import click

from runtime.command import (
    ACTIVATIONS,
    activations_option,
    device_option,
    import_torch,
    out_argument,
    progress,
    read_text,
    run,
)
from runtime.errors import InputError, LoadError

CONTEXT = 2048
BEFORE = 24  # tokens shown before the worst one


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@out_argument
@click.option(
    "--text", "text_file", type=click.Path(exists=True, dir_okay=False, allow_dash=True), required=True,
    help="Text in UTF-8; -: standard input.",
)  # fmt: skip
@click.option("--context", type=click.IntRange(min=2), help=f"Tokens seen together.  Default: the model's, up to {CONTEXT}.")
@click.option("--stride", type=click.IntRange(min=1), help="Tokens from one window to the next.  Default: half the context.")
@click.option("--against", type=click.Path(exists=True, file_okay=False), help="Another checkpoint, compared token by token.")
@click.option("--against-activations", type=ACTIVATIONS, help="Of the other checkpoint; alone: of OUT itself.")
@device_option
@activations_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def main(
    out: str,
    text_file: str,
    context: int | None,
    stride: int | None,
    against: str | None,
    against_activations: str | None,
    device: str | None,
    activations: str,
    as_json: bool,
) -> None:
    """Perplexity of a text under the canonical checkpoint in OUT, and how far another one is from it.

    Example: python -m runtime.evaluate OUT --text FILE --against-activations full
    """
    text, name = read_text(text_file)
    device = import_torch(device)

    from runtime.loader import load_model, read_config
    from runtime.scoring import measure
    from runtime.tokenizer import ChatTokenizer

    tokenizer = ChatTokenizer(out)
    ids, ends = tokenizer.encode_with_ends(text)
    if len(ids) < 2:
        raise InputError(f"{name}: expected a text of at least two tokens, found {len(ids)}")
    architecture = read_config(Path(out)).architecture
    other_out = against or (out if against_activations else None)
    limits = [architecture["max_position_embeddings"]]
    if other_out is not None:
        other_architecture = read_config(Path(other_out)).architecture
        _check_same_vocabulary(out, other_out, architecture, other_architecture, tokenizer, ids, text)
        limits.append(other_architecture["max_position_embeddings"])
    longest = min((limit for limit in limits if limit is not None), default=sys.maxsize)
    context = context or min(CONTEXT, longest)
    stride = stride or max(1, context // 2)
    if context > longest:
        raise click.UsageError(f"--context: expected at most {longest}, the positions of the model, found {context}")
    if stride > context:
        raise click.UsageError(f"--stride: expected at most the context of {context}, found {stride}")
    outside = next((token for token in ids if token >= architecture["vocab_size"]), None)
    if outside is not None:
        raise LoadError(
            f"{out}: expected tokens below {architecture['vocab_size']}, found {outside} in the text's; "
            "the tokenizer belongs to another model: copy the right one"
        )

    model = load_model(out, device=device, activations=activations)
    other = None
    if other_out is not None:
        other = load_model(other_out, device=device, activations=against_activations or activations)
    with progress(len(ids) - 1, "token") as bar:
        own, theirs, comparison = measure(model, ids, ends, text, context, stride, other, bar.update)
    result: dict[str, Any] = own.as_json() | {"context": context, "stride": stride}
    if theirs is not None and comparison is not None:
        worst = comparison.worst
        result |= {
            "against": theirs.as_json(),
            "mean_kl": comparison.mean_kl,
            "max_kl": comparison.max_kl,
            "top1_agreement": comparison.agreement,
            "worst": {
                "position": worst,
                "token": tokenizer.token_text(ids[worst]),
                "before": tokenizer.decode(ids[max(0, worst - BEFORE) : worst]),
            },
        }
    if as_json:
        click.echo(json.dumps(result, ensure_ascii=False))
    else:
        for key, value in _lines(result):
            click.echo(f"{key:<24} {value}")


def _check_same_vocabulary(
    out: str,
    other_out: str,
    architecture: Any,
    other_architecture: Any,
    tokenizer: Any,
    ids: list[int],
    text: str,
) -> None:
    """Raise `LoadError` unless both checkpoints mean the same by every token id."""
    from runtime.tokenizer import ChatTokenizer

    sizes = architecture["vocab_size"], other_architecture["vocab_size"]
    if sizes[0] != sizes[1]:
        raise LoadError(
            f"{other_out}: expected a vocabulary of {sizes[0]}, as {out} has, found {sizes[1]}; they cannot be compared"
        )
    other = ChatTokenizer(other_out)
    if other.vocabulary() != tokenizer.vocabulary() or other.encode(text) != ids:
        raise LoadError(f"{other_out}: expected the tokenizer of {out}, found another; they cannot be compared")


def _lines(result: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    """Names and values, one per line; text quoted so that it stays on its line."""
    lines: list[tuple[str, str]] = []
    for key, value in result.items():
        if isinstance(value, dict):
            lines += _lines(value, f"{prefix}{key}.")
        elif isinstance(value, float):
            lines.append((prefix + key, f"{value:.6g}"))
        else:
            lines.append((prefix + key, json.dumps(value, ensure_ascii=False)))
    return lines


if __name__ == "__main__":
    sys.exit(run(main, "runtime.evaluate"))
