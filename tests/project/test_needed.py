"""Where diffusers or ltx-core is not installed, tests are skipped with a reason; --installed allows no such skip.

pytest tests/project/test_needed.py
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
FILES = {
    # Makes them appear not installed, whether they are or not.
    "absent.py": "import sys\nsys.modules['diffusers'] = sys.modules['ltx_core'] = None\n",
    "test_marked.py": "import pytest\n\n@pytest.mark.ltx_core\ndef test_it():\n    import ltx_core\n",
    "test_top.py": "from diffusers.models import Model\n\ndef test_it():\n    pass\n",
    "test_top_unmarked.py": "from ltx_core.loader import load\n\ndef test_it():\n    pass\n",
    "test_unmarked.py": "import pytest\n\ndef test_it():\n    pytest.importorskip('ltx_core.loader')\n",
    "test_broken.py": "import no_such_module\n",
}


def run(*arguments: str, folder: Path, plugins: Path) -> tuple[int, str]:
    kept = {name: x for name, x in os.environ.items() if not name.startswith(("PYTEST", "PYTHON"))}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "absent", "-p", "no:cacheprovider", "-rsfE", *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env=kept | {"PYTHONPATH": str(plugins)},
    )
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    shutil.copy(TESTS / "conftest.py", tmp_path)
    return tmp_path


def test_what_is_not_there_is_a_reason_to_skip_if_it_is_marked_and_a_failure_if_it_is_said_to_be_there(
    folder: Path,
) -> None:
    status, said = run("test_marked.py", "test_top.py", folder=folder, plugins=folder)
    assert status == 0 and "2 skipped" in said
    assert "needs ltx-core: pip install --no-deps ltx-core==1.0.0" in said and "needs diffusers: pip install" in said
    status, said = run("test_top_unmarked.py", folder=folder, plugins=folder)
    assert status == 2 and "ERROR test_top_unmarked.py" in said
    installed = ["--installed", "ltx_core", "--installed", "diffusers", "--continue-on-collection-errors"]
    status, said = run(*FILES.keys() - {"absent.py"}, *installed, folder=folder, plugins=folder)
    assert status == 1 and "1 failed, 4 errors" in said
    assert "ERROR test_marked.py::test_it - Failed: needs ltx-core" in said
    assert "which --installed ltx_core says is done" in said
    assert "ERROR test_top.py" in said and "ERROR test_broken.py" in said
    assert "FAILED test_unmarked.py::test_it" in said and "expected the mark `pytest.mark.ltx_core`" in said


def test_all_test_files_can_be_collected_without_other_implementations(tmp_path: Path) -> None:
    (tmp_path / "absent.py").write_text(FILES["absent.py"], encoding="utf-8")
    status, said = run("--collect-only", "-q", folder=TESTS.parent, plugins=tmp_path)
    assert status == 0, said
    assert int(re.findall(r"(\d+) tests collected", said)[0]) >= 1500
