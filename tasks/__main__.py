"""Run one step by hand or for DVC: `python -m tasks STEP`; `--list` the steps; `--render` dvc.yaml."""

import importlib.util
import sys

_NEEDED = ("pydantic", "ruamel.yaml", "torch", "transformers", "safetensors")


def _check_interpreter() -> None:
    """Say so in one line when this is not the interpreter that `make` set up, before any import fails."""
    try:
        missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    except ModuleNotFoundError as error:  # the parent package of a dotted name
        missing = [str(error.name)]
    if sys.version_info < (3, 11) or missing:
        lacks = f"lacks {missing[0]}" if missing else "is older than 3.11"
        sys.exit(
            f"error: {sys.executable} (the first python on PATH) {lacks}; run `make run` once, or "
            "`. .venv/bin/activate` and the same command again"
        )


def _run(name: str) -> int:
    """Run a step and return the exit status: 0 done, 2 bad input or a full disk, 1 anything else."""
    import importlib
    import logging

    from nirvana.errors import InputError
    from tasks import registry
    from tasks.params import load_params, restrict
    from tasks.provenance import integrity
    from tasks.workers import child, process

    process.start_logging(name)
    inputs, outputs = registry.paths(name)
    try:
        with process.recorded(name):
            step = registry.step(name)
            params = load_params()
            # a step that does not declare `compute` must not depend on its threads
            threads = params.compute.threads if "compute" in step.params else 1
            process.prepare_environment(threads, step.online(params))
            if step.torch:
                child.fix_torch(threads)
            missing = next((path for path in inputs.values() if not path.exists()), None)
            if missing:
                raise InputError(f"{name}: expected {missing}, found nothing; run `dvc repro {name}` to make it first")
            integrity.check_inputs(inputs.values())
            importlib.import_module(f"tasks.{name}").run(restrict(params, step.params, name), inputs, outputs)
            integrity.note_outputs(outputs.values())
    except InputError as error:
        return _fail(str(error), 2)
    except KeyboardInterrupt:
        return _fail(f"{name} was interrupted; run the same command again", 130)
    except MemoryError:
        return _fail(f"{name} ran out of memory; lower saliency.microbatch or evaluation.batch_size", 2)
    except Exception as error:
        if line := process.disk_full_line(error, name, inputs.values()):
            return _fail(line, 2)
        logging.getLogger(__name__).exception("%s failed", name)
        cause = f"{type(error).__name__}: {error}"
        return _fail(f"{name} failed unexpectedly with {cause}; {process.log_file(name)} has more", 1)
    return 0


def _fail(message: str, status: int) -> int:
    import logging
    import os

    from tasks.tracking.redaction import redact
    from tasks.workers.child import DRIVER_PID
    from tasks.workers.process import ERROR_PREFIX

    line = ERROR_PREFIX + redact(" ".join(message.split()))
    logging.getLogger(__name__).error(line)
    if DRIVER_PID not in os.environ:  # a flow says it itself
        sys.stderr.write(line + "\n")
    return status


def main(arguments: list[str]) -> int:
    """Do what the command line says and return the exit status."""
    if not arguments or arguments[0] in ("-h", "--help"):
        sys.stdout.write(f"{__doc__}\n")
        return 0 if arguments else 2
    _check_interpreter()
    import os

    from tasks import registry
    from tasks.workers import child

    if "DVC_STAGE" in os.environ:  # DVC started it; by hand it may outlive its shell
        child.die_with_parent()
    command, *rest = arguments
    names = [each.name for each in registry.STEPS]
    if command == "--list" and not rest:
        sys.stdout.write("\n".join(names) + "\n")
        return 0
    if command == "--render" and not rest:
        from nirvana.files import atomic_file

        with atomic_file("dvc.yaml") as temporary:
            temporary.write_text(registry.render(), encoding="utf-8")
        return 0
    if command in names and not rest:
        return _run(command)
    import difflib

    close = difflib.get_close_matches(command, names, n=1)
    hint = f"did you mean {close[0]}?" if close else "`python -m tasks --list` shows them"
    sys.stderr.write(f"error: expected one step's name, got {' '.join(arguments)!r}; {hint}\n")
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
