"""Phase 6D: the baseline's update scaled down by scales that are chosen without what is measured.

The frontier says what every scale does to the measured personas, but a scale that is read off there was chosen by the
answer. Here scales are chosen on prompts of the training personas and on rows of the training data, and then measured
once, like any recipe. Nothing is trained.

The training personas have to keep a separation, (1 - M1) / (1 - M1 of the base), of at least that of the bound by which
the study is judged (0.5 where bounds are relative) and a margin of 0.05, since the upper bound of M1 on other personas
has to pass. It is never more than 1, which the base has.

one scale        The largest s, in hundredths, that keeps this separation.
a scale a block  s_b = 1 - t w_b, cut at 0 and 1. The weight w_b is what halving the scale of block b alone gains in
                 separation, divided by what it loses on the training rows; 0 where it gains nothing. t is the smallest
                 that keeps the separation, searched over means of s_b in thousandths.

If separation were linear and the loss quadratic in 1 - s_b, no other scales with as much separation would have a
smaller loss. Neither is quite so, and the scales of the blocks are taken only where their loss on the training rows is
smaller than that of one scale. Both searches are bisections, which assume that a smaller scale keeps more separation.
A model of B blocks takes at most B + 19 small measurements.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import NamedTuple, TypeVar

from minipersona.corpus.mixtures import generator
from minipersona.corpus.training_set import training_set
from minipersona.geometry.extraction import extract, render_prompts
from minipersona.geometry.measures import m1
from minipersona.model.network import Qwen2
from minipersona.records import write_record
from minipersona.run.anchors import anchor_sets, check_unmeasured
from minipersona.run.directory import stored_measurement
from minipersona.run.judgement import bounds_for, separation
from minipersona.run.measurement import measure
from minipersona.study.cell import Study
from minipersona.study.frontier import scaled_baseline
from minipersona.study.worker import Worker
from minipersona.training.heldout import heldout_loss
from minipersona.training.parameters import distance_from_base
from minipersona.verdict.files import ChosenScales, Scaling, scaling_file

MARGIN = 0.05  # of separation, on top of the bound's
QUESTIONS, ROWS = 16, 64  # of the anchor questions and of the training rows
QUESTIONS_DRAW, ROWS_DRAW = 201, 202  # beside the seed: independent of the other draws
LEAST_LOST = 1e-4  # nats; a smaller loss is rounding, and would make a block's weight arbitrary
PARTS, PARTS_OF_MEAN = 100, 1000  # one scale is searched in hundredths, the mean over blocks in thousandths

T = TypeVar("T")
Scales = tuple[float, ...]
"""One a block."""


class Effect(NamedTuple):
    """What scales do to the training personas and the training rows."""

    separation: float
    loss: float  # nats per supervised token


Measure = Callable[[Scales], Effect]


def measure_scaling(study: Study, worker: Worker) -> None:
    """Choose both forms, measure each, and write their vectors, their losses and, last, scaling.json."""
    config, directory = study.placed_config(study.baseline), study.cell_directory(study.baseline)
    instruments = worker.resources.instruments(config)
    untrained = worker.resources.base(config)
    source, blocks = untrained.source, untrained.config.num_hidden_layers
    protocol = instruments.protocol(untrained)
    base = stored_measurement(directory, 0, protocol)
    assert base is not None, "the baseline is published"
    bounds = bounds_for(protocol, base.m1, study.config.bounds)
    least = min(1.0, (separation(bounds.passing, base.m1) or 0.0) + MARGIN)
    effect = _measure_of(study, worker)
    one = choose_one(effect, blocks, least)
    found = []
    for form, scales in (("one", one), ("per_block", choose_per_block(effect, one, least))):
        worker.console.say(f"the baseline's update, scaled by {fmean(scales):.2f} in the mean over blocks")
        model = scaled_baseline(study, study.baseline, scales, worker)
        metrics, vectors, losses = measure(model, instruments, worker.console)
        vectors.save(scaling_file(study.directory, form, ".vectors.safetensors"))
        if losses is not None:
            losses.save(scaling_file(study.directory, form, ".losses.safetensors"))
        model.source = source  # the distance is from what the run started with
        # Judged where it is read, as every checkpoint is.
        measured = metrics.unjudged(config.training.steps, distance_from_base(model, config, worker.distributed))
        found.append(ChosenScales(scales, *effect(scales), measured))
    write_record(study.directory / "scaling.json", Scaling(study.baseline.hash, least, anchor_digests(study), *found))


def anchor_digests(study: Study) -> tuple[str, str]:
    """Of the personas and the questions that scales are chosen on."""
    personas, questions = anchor_sets(study.baseline.recipe.config.objective)
    return personas.digest, questions.digest


def measurements(blocks: int) -> int:
    """The most small measurements that the choice takes: the base, the whole update, each block, two bisections."""
    return 2 + blocks + PARTS.bit_length() + PARTS_OF_MEAN.bit_length()


# ---------------------------------------------------------------- the choice


def choose_one(effect: Measure, blocks: int, least: float) -> Scales:
    """The largest scale, in hundredths, at which the separation is at least `least`; the same for every block."""
    return (largest(lambda scale: effect((scale,) * blocks).separation >= least, PARTS),) * blocks


def choose_per_block(effect: Measure, one: Scales, least: float) -> Scales:
    """Scales that leave the separation `least` with a smaller loss than the scale `one`, or else that."""
    weights = block_weights(effect, len(one))
    mean = largest(lambda mean: effect(with_mean(weights, mean)).separation >= least, PARTS_OF_MEAN)
    scales = with_mean(weights, mean)
    reached = [one, *([scales] if effect(scales).separation >= least else [])]
    return min(reached, key=lambda scales: effect(scales).loss)


def largest(holds: Callable[[float], bool], parts: int) -> float:
    """The largest of 1, 2 ... `parts` parts of 1 at which something holds that also holds below; 0 where it never does.

    It is found by bisection.
    """
    low, high = 0, parts + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle / parts) else (low, middle)
    return low / parts


def block_weights(effect: Measure, blocks: int) -> list[float]:
    """How far each block is scaled down, in proportion."""
    whole = effect((1.0,) * blocks)
    halved = [effect(tuple(0.5 if b == block else 1.0 for b in range(blocks))) for block in range(blocks)]
    return [max(0.0, e.separation - whole.separation) / max(LEAST_LOST, e.loss - whole.loss) for e in halved]


def with_mean(weights: Sequence[float], mean: float) -> Scales:
    """1 - t w_b, cut at 0 and 1, with the t that gives this mean over blocks, to 1e-4.

    Blocks of weight 0 stay at 1. Where they alone have a larger mean, the others are 0.
    """

    def scaled(t: float) -> Scales:
        return tuple(min(1.0, max(0.0, 1 - t * weight)) for weight in weights)

    low, high = 0.0, max((1 / weight for weight in weights if weight > 0), default=0.0)
    for _ in range(60):
        t = (low + high) / 2
        low, high = (t, high) if fmean(scaled(t)) > mean else (low, t)
    return tuple(round(scale, 4) for scale in scaled(high))


# ---------------------------------------------------------------- what it is chosen on


def _measure_of(study: Study, worker: Worker) -> Measure:
    """The effect of scales on the training personas and rows. Equal scales are measured once."""
    config = study.placed_config(study.baseline)
    instruments = worker.resources.instruments(config)
    layer, pack_tokens, tokenizer = instruments.layers[0], instruments.pack_tokens, instruments.tokenizer
    personas, asked = anchor_sets(config.objective)
    check_unmeasured((personas, asked), (instruments.personas, instruments.questions))
    questions = _drawn(asked.questions, QUESTIONS, config.seed, QUESTIONS_DRAW)
    prompts = render_prompts(tokenizer, personas.prompts, questions)
    teaching = [row for row in training_set(config.data, config.seed, tokenizer).documents if row.supervised.any()]
    rows = _drawn(teaching, ROWS, config.seed, ROWS_DRAW)

    def m1_of(model: Qwen2) -> float:
        vectors = extract(
            model, tokenizer, personas.prompts, questions, [layer], pack_tokens=pack_tokens, prompts=prompts
        )
        return m1(vectors.mean(layer))

    base = m1_of(worker.resources.base(config))

    @functools.cache
    def effect(scales: Scales) -> Effect:
        model = scaled_baseline(study, study.baseline, scales, worker)
        return Effect(separation(m1_of(model), base) or 0.0, heldout_loss(model, rows, pack_tokens))

    return effect


def _drawn(entries: Sequence[T], number: int, seed: int, draw: int) -> list[T]:
    """A seeded sample of `number` entries, in their order."""
    chosen = generator(seed, draw).permutation(len(entries))[:number]
    return [entries[i] for i in sorted(map(int, chosen))]
