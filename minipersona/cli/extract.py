"""The `extract` command: persona vectors and their measures, or a comparison of two."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from minipersona.cli.options import FORMS, OF_A_MODEL, command, load, model_options, refuse, show
from minipersona.config import SHIPPED
from minipersona.console import Console
from minipersona.errors import UserError


def extract_options(commands: Any) -> None:
    """Add the command."""
    parser = command(
        commands,
        "extract",
        "Extract persona vectors and print their M1; or compare the vectors of two files or runs, at every layer that "
        "both have.",
        "  python extract.py --layer 20 --out vectors.safetensors\n"
        "  python extract.py --model tiny --layer 4 6\n"
        f"  python extract.py compare before.safetensors after.safetensors\n\n{FORMS}",
    )
    option = parser.add_argument
    option("compare", nargs="*", metavar="compare A B", help="two vectors files, or runs (their last step)")
    model_options(parser)
    option("--layer", type=int, nargs="+", metavar="L", help="blocks counted from 0; default the model's own (7B: 20)")
    option("--method", choices=["A", "B"], default="A", help="A: last token of the prompt; B: mean over a response")
    option("--out", metavar="FILE", help="write the vectors there (safetensors)")
    option("--overwrite", action="store_true", help="replace the file of --out where there is one")
    option("--json", action="store_true", help="print JSON")
    parser.set_defaults(command=lambda options: (_compare if options.compare else _extract)(options))


def _extract(options: argparse.Namespace) -> None:
    from minipersona.files import check_writable
    from minipersona.geometry.extraction import extract
    from minipersona.geometry.prompts import load_personas, load_questions
    from minipersona.geometry.vectors import response_lengths
    from minipersona.model.adapter_files import load_adapter
    from minipersona.records import to_dict
    from minipersona.run.measurement import layer_measures
    from minipersona.run.tables import extraction_table, response_table

    if options.out:
        check_writable(options.out)
        if Path(options.out).exists() and not options.overwrite:
            raise UserError(f"--out {options.out}: exists already; name another file, or add --overwrite")
    personas = load_personas(options.personas or SHIPPED)
    questions = load_questions(options.questions or SHIPPED).questions
    console = Console()
    model, tokenizer = load(options, console)
    if options.adapter:
        load_adapter(model, options.adapter)
    passes = 2 if options.method == "B" else 1  # answered, then read
    with console.progress("extracting", passes * len(personas.prompts) * len(questions), "prompts") as progress:
        vectors = extract(
            model,
            tokenizer,
            personas.prompts,
            questions,
            options.layer or [model.config.probe_layer],
            options.method,
            progress=lambda done, total: progress.advance(done),
        )
    if options.out:
        vectors.save(options.out)
        console.say(f"wrote {options.out}")
    layers = {str(layer): layer_measures(vectors.at(layer)) for layer in vectors.layers}
    value: dict[str, Any] = {
        "layers": {layer: to_dict(measures) for layer, measures in layers.items()},
        "personas": vectors.personas,
        **{key: text for key, text in vectors.metadata.items() if key not in ("questions", "system_prompts")},
    }
    text = extraction_table(layers)
    if vectors.response_tokens is not None:
        value["response_tokens"] = response_lengths(vectors)
        text += "\n\n" + response_table(value["response_tokens"])
    show(options, value, text)


def _compare(options: argparse.Namespace) -> None:
    if options.compare[0] != "compare" or len(options.compare) != 3:
        raise UserError(f"{' '.join(options.compare)}: write extract.py compare A B, two vectors files or runs")
    refuse(options, [*OF_A_MODEL, "--method", "--out", "--overwrite"], "has no effect on compare; leave it out")
    from minipersona.geometry.compare import common_layers, compare
    from minipersona.geometry.vectors import load_vectors
    from minipersona.run.directory import last_vectors
    from minipersona.run.tables import comparison_table

    a, b = (load_vectors(last_vectors(Path(name))) for name in options.compare[1:])
    layers = options.layer or common_layers(a, b)
    if not options.layer and (others := sorted({*a.layers, *b.layers} - {*layers})):
        Console().say(f"only one of the two has the layers {', '.join(map(str, others))}; they are left out")
    comparisons = [compare(a, b, layer) for layer in layers]
    value = {"layers": {str(one.layer): one.to_json() for one in comparisons}}
    show(options, value, comparison_table(comparisons))
