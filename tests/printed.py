"""What a command printed, in one line and without frames."""

import re


def plain(text):
  return " ".join(re.sub("[╭╮╰╯│─]", " ", text).split())
