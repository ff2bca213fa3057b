"""File names and queries in front of people."""

from __future__ import annotations


def shown(text: str) -> str:
    """Text for people: bytes that are no text and control characters as \\xNN."""
    return "".join(
        f"\\x{ord(sign) - 0xDC00:02x}" if 0xDC80 <= ord(sign) <= 0xDCFF else sign if sign.isprintable() else sign.encode("unicode_escape", "backslashreplace").decode()
        for sign in text
    )
