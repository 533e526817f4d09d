"""What made a run, as far as it can be known: versions, commit, digests, hardware. Never an environment variable."""

from __future__ import annotations

import platform
import subprocess
from dataclasses import dataclass, fields, replace
from importlib import metadata
from pathlib import Path

import torch

from minipersona import __version__
from minipersona.config import ObjectiveSection, RunConfig
from minipersona.corpus.training_set import TrainingSet
from minipersona.errors import UserError, require
from minipersona.files import PACKAGE, digest, sha256
from minipersona.model.network import Qwen2
from minipersona.records import from_dict, may_be_missing, read_record, write_record
from minipersona.run.anchors import anchor_sets
from minipersona.run.directory import PROVENANCE
from minipersona.run.measurement import Instruments
from minipersona.run.result import MeasurementProtocol
from minipersona.settings import to_toml


@dataclass(frozen=True)
class Hardware:
    """What a run was computed on."""

    machine: str
    cuda_device: str | None
    cuda: str | None
    processes: int
    threads: int


@dataclass(frozen=True, kw_only=True)
class Environment:
    """The code and the machine of one start of a run."""

    minipersona: str
    code_digest: str
    commit: str | None
    versions: dict[str, str]
    hardware: Hardware


@dataclass(frozen=True)
class DataSource:
    """Rows that were trained on or held out, or a set of personas or questions."""

    source: str
    rows: int
    digest: str
    revision: str | None


@dataclass(frozen=True, kw_only=True)
class Provenance(Environment):
    """provenance.json. `protocol` is what every measurement of the run is made with."""

    protocol: MeasurementProtocol
    config_digest: str
    model: dict[str, str | None]
    data: tuple[DataSource, ...]
    mixture: dict[str, str | int | float | tuple[str, ...] | None]
    anchors: tuple[DataSource, ...] = may_be_missing(())  # personas and questions of an anchored objective
    continued: tuple[Environment, ...] = may_be_missing(())  # of each later start


def provenance(
    config: RunConfig, model: Qwen2, instruments: Instruments, training: TrainingSet, processes: int
) -> Provenance:
    """The provenance of a run that starts now."""
    heldout = [] if instruments.heldout_rows is None else [instruments.heldout_rows.identity()]
    cuda_device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else None
    libraries = {name: metadata.version(name) for name in ("torch", "numpy", "safetensors", "tokenizers")}
    return Provenance(
        protocol=instruments.protocol(model),
        minipersona=__version__,
        code_digest=source_digest(),
        commit=_commit(),
        config_digest=digest(to_toml(config)),
        model={**model.source, "compute_dtype": str(model.compute_dtype).removeprefix("torch.")},
        data=tuple(from_dict(DataSource, source) for source in [*training.sources, *heldout]),
        mixture=training.mixture,
        anchors=_anchors(config.objective),
        versions={"python": platform.python_version(), **libraries},
        hardware=Hardware(
            machine=platform.machine(),
            cuda_device=cuda_device,
            cuda=torch.version.cuda,
            processes=processes,
            threads=torch.get_num_threads(),
        ),
    )


def _anchors(section: ObjectiveSection) -> tuple[DataSource, ...]:
    if not section.anchored:
        return ()
    personas, questions = anchor_sets(section)
    return (
        DataSource(personas.name, len(personas.prompts), personas.digest, None),
        DataSource(questions.name, len(questions.questions), questions.digest, None),
    )


def read_provenance(directory: Path) -> Provenance:
    """The provenance of a run; UserError where the directory is not one of a run."""
    if not (directory / PROVENANCE).is_file():
        raise UserError(
            f"{directory}: is not a run directory (it has no {PROVENANCE}); name one that train.py made, or restore "
            "that file"
        )
    return read_record(directory / PROVENANCE, Provenance, "restore the file, or delete the directory and train again")


def write_provenance(directory: Path, made_by: Provenance) -> None:
    """Write provenance.json. That of a run which continues stays as it began, with the new environment added.

    UserError where the model, rows, responses, anchors or what is measured are not those that it began with: a step
    would not be what it is in one run.
    """
    if (directory / PROVENANCE).is_file():
        began = read_provenance(directory)
        for f in fields(MeasurementProtocol):
            before, now = getattr(began.protocol, f.name), getattr(made_by.protocol, f.name)
            require(
                before == now or before is None,  # an earlier version did not record it
                f"{f.name} is not what {directory} began with ({before}, now {now}); restore it, or choose another "
                "--out",
            )
        written = began.mixture.get("responses_digest"), made_by.mixture.get("responses_digest")
        require(
            None in written or written[0] == written[1],
            f"data.responses: the file is not what {directory} began with; restore it, or choose another --out",
        )
        for was, source in zip([*began.data, *began.anchors], [*made_by.data, *made_by.anchors], strict=False):
            require(
                was.digest == source.digest,
                f"{source.source}: is not what {directory} began with (SHA-256 {was.digest[:8]}, now "
                f"{source.digest[:8]}); restore it, or choose another --out",
            )
        again = Environment(
            minipersona=made_by.minipersona,
            code_digest=made_by.code_digest,
            commit=made_by.commit,
            versions=made_by.versions,
            hardware=made_by.hardware,
        )
        made_by = replace(began, continued=(*began.continued, again))
    write_record(directory / PROVENANCE, made_by)


def source_digest() -> str:
    """One SHA-256 over the package's source files, which also covers changes that are not committed."""
    return sha256(*sorted(PACKAGE.rglob("*.py")))


def _commit() -> str | None:
    git = ["git", "-C", str(PACKAGE)]
    try:
        # Installed below somebody's repository, the package is not in it, and that commit says nothing.
        subprocess.run([*git, "ls-files", "--error-unmatch", "__init__.py"], capture_output=True, check=True, timeout=5)
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True, timeout=5)
        return head.stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None  # installed from a wheel, or no git
