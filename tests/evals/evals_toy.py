"""A model for evals that is no model: ids are bytes, and answers are looked up."""

from evals import rows


def codec(room=64, max_length=80, template='Q: {}\nA: '):
  asked = lambda text: (template.format(text), list(template.format(text).encode()))
  return rows.Codec(
      prompt=asked, after=lambda text: list(text.encode()),
      whole=lambda text: list(text.encode()), decode=lambda ids: bytes(ids).decode(),
      room=room, max_length=max_length)
