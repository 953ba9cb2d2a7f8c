"""Files appear whole or not at all."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from batude_fx.support.atomic_files import atomic_file


def test_threads_may_save_into_one_folder(tmp_path: Path) -> None:
    def write(text: str) -> None:
        for _ in range(50):
            with atomic_file(tmp_path / "file") as place:
                place.write_text(text)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(write, "abcd"))
    assert (tmp_path / "file").read_text() in "abcd"
    assert len(list(tmp_path.iterdir())) == 1
