"""What guards the verdict besides the cells: the base's measurement and the calibration, the frontier, the suites of
answers where they are due, and every layer of a positive recipe.

Each is a job like a cell, with a file that says that it is done. Files that belong to the study as a whole carry the
baseline's hash: after a change that makes another baseline they are made again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from minipersona.behaviour.instructions.suite import instruction_suite
from minipersona.behaviour.roleplay import write_roleplay
from minipersona.behaviour.suite import behaviour_suite
from minipersona.corpus.mixtures import training_personas
from minipersona.corpus.sources import read_source
from minipersona.files import append_jsonl, digest, read_json, write_json
from minipersona.geometry.extraction import extract
from minipersona.geometry.measures import m1
from minipersona.model.network import Qwen2
from minipersona.records import from_dict, to_dict, write_record
from minipersona.run.measurement import Instruments, measure
from minipersona.run.result import Protocol
from minipersona.run.train import vectors_file
from minipersona.study.cell import Cell
from minipersona.study.cells import placed_config, responses_file, trained_model
from minipersona.study.frontier import measure_frontier
from minipersona.study.runner import Job, Runner
from minipersona.verdict.calibration import calibrate
from minipersona.verdict.files import Sweep, SweptLayer, SweptRecipe, read_optional
from minipersona.verdict.recipe_results import RecipeResult, RecipeSummary

MUCH_RAW_TEXT = 0.25  # of the rows; from here on a cell reports how well it follows instructions


def study_job(runner: Runner, file: str, name: str, work: Callable[[], None]) -> Job:
    """A job that leaves a JSON file in the study's directory, with the baseline's hash in it."""
    path = runner.directory / file
    hash_ = runner.baseline.hash

    def done() -> bool:
        return path.is_file() and read_json(path).get("baseline") == hash_

    return Job(f"{path.stem}-{hash_[:12]}", "1", name, done, lambda claim: work())


# ---------------------------------------------------------------- before the cells


def base_job(runner: Runner) -> Job:
    """The untouched model's measurement, which every cell takes over, and the calibration on it."""
    return study_job(runner, "calibration.json", "base", lambda: measure_base(runner))


def measure_base(runner: Runner) -> None:
    """Write base/probes.jsonl, base/vectors/ and calibration.json."""
    config, directory = runner.baseline.recipe.config, runner.directory / "base"
    instruments, model = runner.bench.instruments(config), runner.bench.model(config)
    protocol = instruments.protocol(model)
    row, vectors = measure(model, instruments, runner.console)
    vectors.save(vectors_file(directory, 0))
    row = {"step": 0, **row, "learned": None, "delta_norm": 0.0, "protocol": digest(protocol)}
    append_jsonl(directory / "probes.jsonl", row)
    calibration = calibrate(from_dict(Protocol, protocol), row["m1_by_layer"], runner.baseline.hash)
    write_record(runner.directory / "calibration.json", calibration)


def role_play_job(runner: Runner, cell: Cell) -> Job:
    """The responses that a cell of phase 4B is trained on."""
    config = cell.recipe.config
    file = responses_file(runner, config.seed)
    report = file.with_suffix(".json")
    section = runner.config.role_play

    def write() -> None:
        model, tokenizer = runner.bench.model(config), runner.bench.tokenizer(config)
        done = write_roleplay(
            model,
            tokenizer,
            read_source(config.data.train),
            training_personas(),
            file,
            runner.console,
            seed=config.seed,
            max_new_tokens=section.max_new_tokens,
            max_prompt_tokens=config.data.max_tokens,
            temperature=section.temperature,
            batch=runner.config.behaviour.batch,
        )
        write_json(report, done)

    return Job(f"role-play-{file.stem}", "4B", "writing responses", report.is_file, lambda claim: write())


# ---------------------------------------------------------------- after the cells


def frontier_job(runner: Runner) -> Job:
    """The baseline's update scaled down."""
    return study_job(runner, "frontier.json", "frontier", lambda: measure_frontier(runner))


def behaviour_jobs(runner: Runner, recipes: Sequence[RecipeResult]) -> list[Job]:
    """The suite of answers for these recipes and for what they are compared with: the base, the unmixed EM cell."""
    if not recipes:
        return []
    by_hash = {cell.hash: cell for cell in runner.cells}
    steps: dict[str, int | None] = {
        cell.hash: None for cell in runner.cells if cell.recipe.phase == "EM" and runner.published(cell)
    }
    for recipe in sorted(recipes, key=lambda recipe: recipe.merit):  # of several steps the best is asked
        steps |= {result.hash: recipe.step for result in recipe.cells}
    return [
        _base_suite(runner, "behaviour"),
        *[_cell_suite(runner, by_hash[key], step, "behaviour") for key, step in steps.items()],
    ]


def instruction_jobs(runner: Runner) -> list[Job]:
    """Instruction following of the cells with much raw text, beside base and baseline."""
    due = [cell for cell in runner.cells if _much_raw_text(cell) and runner.published(cell)]
    if not due:
        return []
    cells = [runner.baseline, *due]
    return [_base_suite(runner, "instructions"), *[_cell_suite(runner, cell, None, "instructions") for cell in cells]]


def _much_raw_text(cell: Cell) -> bool:
    return cell.recipe.phase == "5A" and float(cell.recipe.knobs["broad_fraction"]) >= MUCH_RAW_TEXT


def _base_suite(runner: Runner, suite: str) -> Job:
    config = runner.baseline.recipe.config
    return _suite_job(
        runner, suite, "base", "1", "the base", runner.directory / "base", 0, lambda: runner.bench.model(config)
    )


def _cell_suite(runner: Runner, cell: Cell, step: int | None, suite: str) -> Job:
    """A suite for the model that a cell left at a step, by default its last. Another step's answers are asked anew."""
    directory, config = runner.cell_directory(cell), placed_config(runner, cell)
    at = step or config.training.steps
    whose = cell.recipe.name + ("" if step is None else f" step {step}")
    return _suite_job(
        runner, suite, cell.id, cell.recipe.phase, whose, directory, at,
        lambda: trained_model(runner, config, directory, at),
    )  # fmt: skip


def _suite_job(
    runner: Runner, suite: str, id_: str, phase: str, whose: str, directory: Path, step: int, model: Callable[[], Qwen2]
) -> Job:
    """Done where the suite was asked of this step and by these settings; answers that are kept are not asked again."""
    path = directory / f"{suite}.json"
    about = {"step": step, "settings_digest": digest(to_dict(getattr(runner.config, suite)))}

    def done() -> bool:
        return path.is_file() and about.items() <= read_json(path).items()

    def work() -> None:
        _ask(runner, suite, model(), directory)
        write_json(path, {**read_json(path), **about})

    return Job(f"{id_}+{suite}-{step}", phase, f"{suite} of {whose}", done, lambda claim: work())


def _ask(runner: Runner, suite: str, model: Qwen2, directory: Path) -> None:
    """Have a model answer a suite's prompts, in a directory that keeps every answer."""
    study, config = runner.config, runner.baseline.recipe.config
    tokenizer = runner.bench.tokenizer(config)
    if suite == "behaviour":
        base = None if config.training.method == "lora" else runner.bench.model(config)
        behaviour_suite(model, tokenizer, directory, study.behaviour, runner.console, base=base)
    else:
        instruction_suite(
            model,
            tokenizer,
            directory,
            study.instructions.file or None,
            runner.console,
            max_new_tokens=study.instructions.max_new_tokens,
            batch=study.behaviour.batch,
        )


def sweep_job(runner: Runner, recipe: RecipeSummary) -> Job:
    """M1 of a positive recipe at every layer, beside base and baseline."""
    cell = next(cell for cell in runner.cells if cell.hash == recipe.hashes[0])
    path = runner.directory / "sweep.json"
    which = SweptRecipe(cell.id, recipe.phase, recipe.name, recipe.step)

    def sweep() -> None:
        config, last = runner.baseline.recipe.config, runner.baseline.recipe.config.training.steps
        instruments = runner.bench.instruments(config)

        def trained(one: Cell, step: int) -> dict[str, float]:
            placed, directory = placed_config(runner, one), runner.cell_directory(one)
            return every_layer(instruments, trained_model(runner, placed, directory, step))

        base = every_layer(instruments, runner.bench.model(config))
        baseline, swept = trained(runner.baseline, last), trained(cell, recipe.step or last)
        layers = {layer: SweptLayer(base[layer], baseline[layer], swept[layer]) for layer in base}
        write_record(path, Sweep(which, layers))

    def done() -> bool:
        stored = read_optional(path, Sweep)
        return stored is not None and stored.recipe == which

    name = f"every layer of {recipe.cell}"
    return Job(f"sweep-{cell.id}-{recipe.step or 'last'}", cell.recipe.phase, name, done, lambda claim: sweep())


def every_layer(instruments: Instruments, model: Qwen2) -> dict[str, float]:
    """M1 at each layer of a model."""
    vectors = extract(
        model,
        instruments.tokenizer,
        instruments.personas.prompts,
        instruments.questions.questions,
        range(model.config.num_hidden_layers),
        pack_tokens=instruments.pack_tokens,
    )
    return {str(layer): m1(vectors.mean(layer)) for layer in vectors.layers}
