"""`orchestrate report`: gather, examine, draw, write."""

from pathlib import Path

from orchestrator.ledger import Ledger
from orchestrator.report import REPORT_FILE
from orchestrator.report.dictionary_facts import DictionaryFacts, examine
from orchestrator.report.page import ReportContent, render_page
from orchestrator.report.sweep_facts import StudyFacts, SweepFacts, gather_sweep
from orchestrator.report.token_texts import TokenTexts
from orchestrator.storage.shared import SHARED, Storage
from qkmodel.errors import InputError
from qkmodel.files import require_place, write_atomically


def write_report(ledger: Ledger, output: Path | None = None, training_id: str | None = None) -> tuple[Path, list[str]]:
    """Writes a sweep's report to `output` (None: `report.html` in the sweep's folder).

    Returns the file and what it leaves out, in lines. `training_id` stands for its study in place of the front's knee.
    Raises InputError for an id of no finished training, a place that cannot be written to, and a sweep of pair masks.
    """
    if any(study.task == "pair_mask" for study in ledger.studies()):
        raise InputError(
            f"{ledger.folder.name}: a report is of transcoders; orchestrate fronts shows masks, orchestrate explain "
            "what one of them keeps"
        )
    path = ledger.folder / REPORT_FILE if output is None else output
    ledger.require_folder()
    require_place("--output", path)
    content = gather_report(gather_sweep(ledger, training_id), ledger.folder, ledger.storage)
    write_atomically(path, render_page(content).encode())
    if output is None:
        ledger.storage.send(path)
    return path, content.left_out


def gather_report(facts: SweepFacts, sweep_folder: Path, storage: Storage = SHARED) -> ReportContent:
    """Adds what only dictionaries and activations tell; what cannot be had is left out with a line."""
    texts, dictionaries, left_out = TokenTexts(), {}, []
    for study in facts.studies:
        found = _examined(study, sweep_folder, len(facts.studies), texts, storage)
        if isinstance(found, DictionaryFacts):
            dictionaries[study.status.study.study_id] = found
        else:
            left_out.append(f"{study.title}: {found}")
    if not facts.studies:
        left_out.append("the sweep has no study yet")
    if texts.missing is not None:
        left_out.append(texts.missing)
    return ReportContent(facts, dictionaries, left_out)


def _examined(
    study: StudyFacts, sweep_folder: Path, studies: int, texts: TokenTexts, storage: Storage
) -> DictionaryFacts | str:
    """What the study's dictionary does, or why that is left out."""
    if not study.finished:
        return "no training has finished yet; its front and everything after it are left out"
    if study.chosen is None:
        return (
            "no finished training is inside the feasible box; heads, features and sentences are left out "
            "(--training ID shows those of one outside)"
        )
    try:
        return examine(sweep_folder, study.status.study, study.chosen, studies, texts, storage)
    except InputError as error:
        return f"features and sentences of {study.chosen.label} are left out: {error}"
