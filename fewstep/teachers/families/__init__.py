"""One file for each family of pipelines, named in `teachers.load.FAMILIES`; files that begin with _ are shared by several."""
