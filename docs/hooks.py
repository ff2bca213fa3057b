"""What the site shows and the repository does not keep: pictures of the report and of the browser page, made by `make docs` where a demo run and a Chromium are."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

PICTURE = re.compile(r"\{\{ picture (\w+): (.*?) \}\}")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """`{{ picture NAME: what it shows }}` becomes the picture, or a sentence where it could not be made."""
    up = "../" * page.file.src_uri.count("/")

    def shown(found: re.Match[str]) -> str:
        name, text = found.groups()
        if (Path(config["docs_dir"]) / "pictures" / f"{name}.png").is_file():
            return f"![{text}]({up}pictures/{name}.png)"
        return f"*No picture here ({text}): it is made by `make docs` where there is a finished demo run and a Chromium.*"

    return PICTURE.sub(shown, markdown)
