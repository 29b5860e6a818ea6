"""Scripts that train when they are imported, as reader processes import them."""

import multiprocessing
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
from experiments import ROOT, TINY

import resnet_flax
from resnet_flax.data import readers
from resnet_flax.errors import UserError

SENTENCE = 'put its calls below `if __name__ == "__main__":`, or use data.workers=0'


def test_a_process_of_another_program_is_told(monkeypatch, tmp_path):
    process = SimpleNamespace(name="Process-1", _inheriting=True)
    monkeypatch.setattr(multiprocessing, "current_process", lambda: process)
    with pytest.raises(UserError, match=r"below `if __name__ == "):
        resnet_flax.train(resnet_flax.default_config(), tmp_path)
    with pytest.raises(UserError, match=r"below `if __name__ == "), readers.reading([1], 1):
        pass
    with readers.reading([1], 0) as numbers:  # without processes, there is nothing against it
        assert next(numbers) == 1


@pytest.mark.long
@pytest.mark.parametrize("guarded", [False, True])
def test_a_script_without_a_main_guard_is_told_what_it_lacks(data_dir, tmp_path, guarded):
    call = f"resnet_flax.train(config, {str(tmp_path / 'run')!r})\n"
    script = tmp_path / "script.py"
    script.write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import resnet_flax\n"
        "config = resnet_flax.default_config()\n"
        f"config.model.name, config.model.overrides = 'cifar_resnet8', {TINY!r}\n"
        f"config.data.data_dir, config.data.workers, config.steps = {data_dir!r}, 2, 2\n"
        + ("if __name__ == '__main__':\n    " * guarded + call)
    )
    done = subprocess.run(
        [sys.executable, script], env=os.environ, capture_output=True, text=True, timeout=300
    )
    if guarded:
        assert (done.returncode, done.stderr) == (0, "")
        return
    assert done.returncode == 1
    assert done.stderr.count("Traceback") == 1  # of the script itself
    assert SENTENCE in done.stderr.splitlines()[-1]
