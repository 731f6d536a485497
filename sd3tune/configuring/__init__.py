"""From a folder of pictures to ``run.yaml`` and ``datasets.yaml``, question by question. No front end lives here.

A `Wizard` is a frozen state; every step gives another one::

    wizard = Wizard(look())                    # this machine; Wizard(Machine(...)) for another
    while (question := wizard.question) is not None:
        question.asks, question.why            # what it asks, and why, in a sentence each
        question.kind, question.choices        # how to ask: choice, number, text, texts, yes/no, folder
        question.default, question.shown_default
        wizard.notes                           # what the last answer means here: what was found, advice, what stands in the way
        wizard = wizard.answer(value)          # typed text or a value; nothing is the default. Raises ConfigError with the reason
        wizard = wizard.back()                 # the last question again
    wizard.summary                             # (question, answer) rows
    wizard.cautions                            # what should be looked at before anything is written
    wizard.config, wizard.dataset              # at any time, as far as the answers go
    files = wizard.files(folder)               # names that are free, and texts; files.write(), files.commands, files.cell
"""

from sd3tune.configuring.machine import Machine, look
from sd3tune.configuring.questions import Choice, Question
from sd3tune.configuring.wizard import Wizard

__all__ = ["Choice", "Machine", "Question", "Wizard", "look"]
