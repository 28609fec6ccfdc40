"""The commands of `orchestrate` for clusters: submit, jobs, logs, cancel."""

from pathlib import Path
from typing import Annotated

import typer

from orchestrator.cli_output import JsonOption, console, messages, naming, print_json, print_plan
from orchestrator.config import load_sweep

cluster_commands = typer.Typer()
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="A job, as `orchestrate jobs` lists it.")]


@cluster_commands.command()
def submit(
    file: Annotated[
        # whether it can be read is answered by what reads it
        Path, typer.Argument(metavar="FILE", readable=False, help="A sweep file, for example sweeps/l1.yaml.")
    ],
    cluster: Annotated[
        str, typer.Option(metavar="NAME", help="local, the NAME of clusters/NAME.yaml, or a cluster's file.")
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Overrides, as of orchestrate sweep.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be handed over and the plan; submit nothing.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Have a cluster start or continue a sweep; it runs what `orchestrate sweep` runs."""
    config = load_sweep(file, overrides or [])
    from orchestrator.cluster import submission

    if dry_run:
        messages.print(submission.script_of(config, cluster), markup=False, highlight=False, soft_wrap=True)
        with naming(file):
            there, described = submission.for_cluster(config, cluster)
            print_plan(there, as_json, fresh=False, here=described.backend == "local")
        return
    job = submission.submit(config, cluster)
    if as_json:
        print_json({"job": job.id, "handle": job.record.handle, "folder": str(job.folder)})
        return
    messages.print(f"submitted as {job.id}", markup=False, highlight=False)
    messages.print(f"follow it: orchestrate logs -f {job.id}", markup=False, highlight=False)
    messages.print(f"end it:    orchestrate cancel {job.id}", markup=False, highlight=False)


@cluster_commands.command()
def jobs(as_json: JsonOption = False) -> None:
    """What was submitted from this folder, and where it is."""
    from orchestrator.cluster.job import all_jobs
    from orchestrator.cluster.submission import jobs_table, known_statuses

    readable, complaints = all_jobs()
    listed = known_statuses(readable)
    for line in complaints:
        messages.print(line, markup=False, highlight=False, soft_wrap=True)
    if as_json:
        print_json(
            [
                {
                    "job": job.id,
                    "sweep": job.record.sweep,
                    "cluster": job.record.cluster_name,
                    "state": status.state,
                    "detail": status.detail,
                    "submitted": job.record.submitted.isoformat(),
                }
                for job, status in listed
            ]
        )
        return
    console.print(jobs_table(listed))


@cluster_commands.command()
def logs(
    job: JobArgument,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the job is over.")] = False,
) -> None:
    """What a job's sweep has said."""
    from orchestrator.cluster.job import open_job
    from orchestrator.cluster.submission import backend_of_job

    opened = open_job(job)
    for piece in backend_of_job(opened).logs(opened, follow):
        console.file.write(piece)
        console.file.flush()


@cluster_commands.command()
def cancel(job: JobArgument) -> None:
    """Have a job end; what it has trained is kept, and submitting the sweep again goes on from there."""
    from orchestrator.cluster.job import open_job
    from orchestrator.cluster.submission import cancel as end

    end(open_job(job))
    messages.print(f"{job}: told to end", markup=False, highlight=False)
