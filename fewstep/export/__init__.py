"""Export: a folder that does in plain diffusers what the trained student does, or an error.

    pipeline    `export`: a student as a stock pipeline folder
    lora        `export_lora`: a student's adapters for the teacher's own pipeline, in diffusers' and kohya's layout
    verify      samples in memory, samples of a process without fewstep, and their comparison
    _isolated   the program of that process
    card        the model card; `update_card` writes scores into it
    guidance_text   the card's paragraph on guidance
    templates/  the texts of cards and of their code

A folder is written under a temporary name, opened in a fresh process that runs the code of its card, compared with the
student in memory in timesteps and pixels, and only then takes its name. Files are safetensors, JSON and Markdown.

Export imports `teachers` and what lies below; training and the command line may import it.
"""

from fewstep.export.card import update_card
from fewstep.export.lora import export_lora
from fewstep.export.pipeline import export
from fewstep.export.verify import ExportError

__all__ = ["ExportError", "export", "export_lora", "update_card"]
