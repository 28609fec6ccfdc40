"""Jobs of a running Ray cluster, through its Jobs API: the sweep runs on the head node, its packs on all."""

import contextlib
import logging
import math
import shlex
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import requests
from ray._private.runtime_env import packaging
from ray.dashboard.modules import dashboard_sdk
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobSubmissionClient
from ray.job_submission import JobStatus as RayStatus
from urllib3.exceptions import ProtocolError

from orchestrator.cluster.backend import NoAnswer, refuse_relative_tracking
from orchestrator.cluster.config import RayCluster
from orchestrator.cluster.job import SWEEP, Job, JobStatus, exit_code
from orchestrator.cluster.log_file import HICCUP_SECONDS
from orchestrator.config import SweepConfig
from orchestrator.storage.address import is_bucket
from qkmodel.errors import InputError
from qkmodel.files import user_path

ANSWER_SECONDS = 8.0
# a job of a busy cluster begins late, and this one is not worth waiting for
PROBE_SECONDS = 8.0
POLL_SECONDS = 1.0
# what of a working directory no sweep reads
_LEFT_OUT = (".git", ".venv", "runs", "__pycache__")
# Ray kills what has not ended by then; a sweep writes its checkpoints within ten seconds
_STOP_SECONDS = "15"


class RayBackend:
    """See `Backend`."""

    def __init__(self, cluster: RayCluster) -> None:
        self._cluster = cluster

    def check(self, config: SweepConfig) -> None:
        if not is_bucket(config.storage) and not Path(config.storage).expanduser().is_absolute():
            raise InputError(
                f"storage: {config.storage} is relative, and the sweep runs elsewhere; write the absolute path of a "
                "folder that all nodes share, in the sweep file or in the cluster's"
            )
        refuse_relative_tracking(config)
        wanted = self._cluster.working_directory
        if wanted is not None and not user_path("working_directory", wanted).is_dir():
            raise InputError(f"working_directory: {wanted}: there is no such folder")
        self._probe(config.storage)

    def _probe(self, storage: str) -> None:
        """A job that only looks whether a sweep could run there. A cluster too busy to say so in time says nothing."""
        client, deadline = self._client(), time.monotonic() + PROBE_SECONDS
        looks = f"{shlex.quote(self._cluster.python)} -m orchestrator.cluster.probe {shlex.quote(storage)}"
        with _one_line(self._cluster.address):
            environment = {"env_vars": self._cluster.environment}
            name = _submit_before(deadline, client, entrypoint=looks, runtime_env=environment)
            while not (details := client.get_job_info(name)).status.is_terminal():
                if time.monotonic() > deadline:
                    client.stop_job(name)
                    return
                time.sleep(0.2)
            said = client.get_job_logs(name).strip().splitlines() or [str(details.message)]
        if details.status != RayStatus.SUCCEEDED:
            if "No module named" in said[-1]:
                if self._cluster.packages:
                    # which are what is missing, perhaps, and take longer to install than is waited here
                    return
                raise InputError(
                    f"python: {self._cluster.python} on the cluster's head does not have this program; name the "
                    "interpreter that has it, or install it there"
                )
            raise InputError(f"{self._cluster.address}: {said[-1]}")

    def script(self, job: Job, config: SweepConfig) -> str:
        lines = [f"job at {self._cluster.address}", f"entrypoint: {_entrypoint(self._cluster.python)}"]
        if self._cluster.working_directory is not None:
            lines.append(f"working directory: {Path(self._cluster.working_directory).expanduser().absolute()}")
        return "\n".join([*lines, *(f"{key}: {value}" for key, value in self._runtime_env(None).items())])

    def submit(self, job: Job) -> None:
        client = self._client()
        with _one_line(self._cluster.address), self._upload(job) as folder:
            client.submit_job(
                submission_id=job.record.handle,
                entrypoint=_entrypoint(self._cluster.python),
                runtime_env=self._runtime_env(folder),
                metadata={"sweep": job.record.sweep},
            )

    def status(self, job: Job) -> JobStatus:
        with _one_line(self._cluster.address):
            try:
                details = self._client().get_job_info(job.record.handle)
            except RuntimeError as error:
                if "does not exist" not in str(error):
                    raise
                return JobStatus(state="lost", detail="the cluster no longer knows it; submit it again to go on")
        return _status(job, details)

    def logs(self, job: Job, follow: bool) -> Iterator[str]:
        client, said, answered = self._client(), 0, -math.inf
        while True:
            try:
                with _one_line(self._cluster.address):
                    over = client.get_job_info(job.record.handle).status.is_terminal()
                    text = client.get_job_logs(job.record.handle)
            except InputError:
                if time.monotonic() > answered + HICCUP_SECONDS:
                    raise
                time.sleep(POLL_SECONDS)
                continue
            answered = time.monotonic() if follow else answered
            if len(text) > said:
                yield text[said:]
                said = len(text)
            if over or not follow:
                return
            time.sleep(POLL_SECONDS)

    def cancel(self, job: Job) -> None:
        with _one_line(self._cluster.address):
            self._client().stop_job(job.record.handle)

    def _client(self) -> JobSubmissionClient:
        cluster, headers = self._cluster, {}
        if cluster.token_file is not None:
            token = user_path("token_file", cluster.token_file)
            if not token.is_file():
                raise InputError(f"token_file: {token}: there is no such file; it holds the cluster's token")
            headers = {"Authorization": f"Bearer {_read_token(token)}"}
        # what it uploads and connects to is no news to a person
        for talkative in (dashboard_sdk, packaging):
            logging.getLogger(talkative.__name__).setLevel(logging.WARNING)
        with _one_line(cluster.address):
            return _Client(cluster.address.rstrip("/"), headers=headers)

    def _runtime_env(self, folder: Path | None) -> dict[str, object]:
        settings: dict[str, object] = {
            "env_vars": self._cluster.environment | {"RAY_JOB_STOP_WAIT_TIME_S": _STOP_SECONDS}
        }
        if folder is not None:
            settings["working_dir"] = str(folder)
        if self._cluster.packages:
            settings["pip"] = list(self._cluster.packages)
        return settings

    @contextlib.contextmanager
    def _upload(self, job: Job) -> Iterator[Path]:
        """What the job finds in its working directory."""
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "job"
            wanted = self._cluster.working_directory
            if wanted is not None:
                left_out = shutil.ignore_patterns(*_LEFT_OUT)
                shutil.copytree(Path(wanted).expanduser(), folder, symlinks=True, ignore=left_out)
            else:
                folder.mkdir()
            # a link would be written through, to the person's own file
            (folder / SWEEP).unlink(missing_ok=True)
            shutil.copy(job.sweep_file, folder / SWEEP)
            yield folder


class _Client(JobSubmissionClient):
    """Ray's own, which would wait for an answer for ever."""

    def _do_request(self, *arguments: Any, **settings: Any) -> requests.Response:
        return super()._do_request(*arguments, timeout=ANSWER_SECONDS, **settings)


def _read_token(file: Path) -> str:
    try:
        token = file.read_text(encoding="ascii").strip()
    except (OSError, UnicodeError):
        token = ""
    if not token or not token.isprintable() or " " in token:
        raise InputError(f"token_file: {file}: does not hold a token: one line of letters and digits")
    return token


def _submit_before(deadline: float, client: JobSubmissionClient, **job: Any) -> str:
    """Submits; a cluster that has just been started takes no jobs for some seconds."""
    while True:
        try:
            return client.submit_job(**job)
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.5)


def _entrypoint(python: str) -> str:
    # Ray sets one thread for it, which packs and caches do not heed, but what the driver measures does
    return f"exec env -u OMP_NUM_THREADS {shlex.quote(python)} -m orchestrator sweep {SWEEP}"


def _status(job: Job, details: JobDetails) -> JobStatus:
    match details.status:
        case RayStatus.PENDING:
            return JobStatus(state="pending")
        case RayStatus.RUNNING:
            return JobStatus(state="running", detail=f"Ray job {job.record.handle}")
        case RayStatus.STOPPED:
            return job.unless_cancelled(JobStatus(state="interrupted", detail="stopped by somebody else"))
        case RayStatus.SUCCEEDED:
            return JobStatus(state="finished")
    if details.driver_exit_code is not None:
        return job.status_of_exit(exit_code(details.driver_exit_code))
    said = next(iter(str(details.message).splitlines()), "")
    return job.unless_cancelled(JobStatus(state="lost", detail=said))


@contextlib.contextmanager
def _one_line(address: str) -> Iterator[None]:
    """What Ray complains of, as one line."""
    try:
        yield
    except InputError:
        # said already, and it is a ValueError
        raise
    except AuthenticationError:
        raise InputError(
            f"{address}: the cluster does not let you in without its token; token_file names the file that holds it"
        ) from None
    except (ConnectionError, requests.ConnectionError) as error:
        if isinstance(next(iter(error.args), None), ProtocolError):
            # it was there, and may have heard
            raise NoAnswer(f"{address}: the connection broke before the cluster answered") from None
        reason = "refused" if "refused" in str(error.__cause__ or error.__context__ or error) else "no connection"
        raise InputError(
            f"{address}: nobody answers ({reason}); the address is that of the Ray cluster's dashboard, port 8265 as a "
            "rule"
        ) from None
    except requests.Timeout:
        raise NoAnswer(f"{address}: the cluster did not answer within {ANSWER_SECONDS:.0f} s") from None
    except (requests.RequestException, ValueError):
        raise InputError(f"{address}: what answers there is no Ray cluster's dashboard") from None
    except RuntimeError as error:
        raise InputError(f"{address}: {next(iter(str(error).splitlines()), type(error).__name__)}") from None
