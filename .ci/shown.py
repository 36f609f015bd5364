"""What a package index would show of the newest wheel of a folder: its page in HTML, each link and picture absolute. FOLDER"""

from __future__ import annotations

import email
import re
import sys
import tomllib
import zipfile
from pathlib import Path

from readme_renderer.markdown import render


def main(folder: Path) -> int:
    wheel = max(folder.glob("*.whl"), key=lambda path: path.stat().st_mtime)
    with zipfile.ZipFile(wheel) as archive:
        name = next(name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        metadata = email.message_from_bytes(archive.read(name))
    page = render(metadata.get_payload(decode=True).decode("utf-8"))
    assert page, "the description is not rendered"
    repository = tomllib.loads(Path("pyproject.toml").read_text("utf-8"))["project"]["urls"]["Repository"]
    links = re.findall(r'(?:href|src)="([^"]+)"', page)
    relative = [link for link in links if not link.startswith(("https://", "#"))]
    here = [link.removeprefix(f"{repository}/blob/main/").partition("#")[0] for link in links if link.startswith(repository)]
    missing = [path for path in here if not Path(path).exists()]
    assert links, "no link at all"
    assert not relative, f"relative links: {relative}"
    assert not missing, f"not in the repository: {missing}"
    print(f"{wheel.name}: {len(links)} links, none relative; {len(here)} into the repository, all there")
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
