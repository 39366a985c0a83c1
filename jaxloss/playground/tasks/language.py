"""English text, next word by next word: one head of a language model, computed in three ways."""

import re
from collections import Counter
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int

import jaxloss

from ..task import Examples, Metric, Splits, Task, Tree, split
from ..transformer import apply_transformer, init_transformer

VOCABULARY, LENGTH, WIDTH = 4096, 64, 64
COUNTS = (1500, 64, 64)  # windows of text
UNKNOWN = "<other>"


@cache
def corpus() -> tuple[tuple[str, ...], np.ndarray]:
    """The words and signs of Python's own help texts: the commonest, and the text as numbers."""
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    words = [found[0] for found in re.finditer(r"\w+|([^\w\s]|\n)\1*", text)]
    common = [UNKNOWN, *(word for word, _ in Counter(words).most_common(VOCABULARY - 1))]
    number = {word: i for i, word in enumerate(common)}
    return tuple(common), np.array([number.get(word, 0) for word in words], np.int32)


def load(seed: int) -> Splits:
    """Windows of text that do not overlap; the target of a word is the word after it."""
    _, text = corpus()
    windows = len(text) // (LENGTH + 1)
    text = text[: windows * (LENGTH + 1)].reshape(windows, -1)
    return split(Examples(text[:, :-1], text[:, 1:]), COUNTS, np.random.default_rng(seed))


def apply(params: Tree, tokens: Int[Array, "n t"]) -> Tree:
    """Hidden states, and the embedding that also serves as the head."""
    return dict(hidden=apply_transformer(params, tokens), kernel=params["embed"].T)


def plain_head(prediction: Tree, labels: Int[Array, "n t"]) -> Array:
    """All logits at once, tokens x vocabulary, then their cross-entropy."""
    return jaxloss.sequence_cross_entropy(prediction["hidden"] @ prediction["kernel"], labels)


def fused_head(prediction: Tree, labels: Int[Array, "n t"], **options: Any) -> Array:
    """The same loss, which never holds the logits of more than a block."""
    return jaxloss.linear_cross_entropy(
        prediction["hidden"], prediction["kernel"], labels, chunk_size=128, **options
    )


def perplexity(prediction: Tree, labels: Int[Array, "n t"]) -> Float[Array, ""]:
    """Among how many equally likely words the model has to choose, on average."""
    return jnp.exp(fused_head(prediction, labels))


def draw_words(figure: Any, predictions: Mapping[str, Tree], test: Examples) -> None:
    """The beginning of a test text, and the probability that each head gave each word."""
    words, _ = corpus()
    labels = jnp.asarray(test.target[:1, :16])
    axes = figure.subplots()
    for row, prediction in enumerate(predictions.values()):
        hidden = prediction["hidden"][:1, :16]
        log_probs = jaxloss.linear_token_log_probs(hidden, prediction["kernel"], labels)
        probs = np.exp(np.asarray(log_probs[0]))
        for column, (label, p) in enumerate(zip(labels[0].tolist(), probs, strict=True)):
            color = (1 - 0.6 * p, 1.0, 1 - 0.6 * p)
            style = dict(ha="center", va="center", fontsize=8, bbox=dict(fc=color, ec="none"))
            axes.text(column, row, f"{words[label].strip() or '¶':.9}\n{p:.2f}", **style)
    axes.set(xlim=(-0.5, 15.5), ylim=(len(predictions) - 0.5, -0.5), xticks=[])
    axes.set_yticks(range(len(predictions)), list(predictions))
    axes.spines[:].set_visible(False)
    figure.suptitle(
        "Words of a test text with the probability each head gave them: greener is surer"
    )


TASK = Task(
    title=f"language: Python's help texts word by word, {VOCABULARY} words, a causal transformer",
    load=load,
    init=partial(init_transformer, vocabulary=VOCABULARY, width=WIDTH, layers=2, length=LENGTH),
    apply=apply,
    losses={
        "plain_head": plain_head,
        "fused_by_tokens": partial(fused_head, implementation="tokens"),
        "fused_by_vocabulary": partial(fused_head, implementation="vocabulary"),
    },
    metrics=[Metric("perplexity", "", perplexity, higher_is_better=False, tolerance=2.0)],
    optimizer=optax.adam(3e-3),
    batch_size=8,
    steps=200,
    evaluations=8,
    evaluated=64,
    costs=True,
    picture=draw_words,
)
