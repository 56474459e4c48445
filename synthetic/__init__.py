"""A world with exact answers: rendered panoramas of which everything is known.

`scenes` makes a scene from a seed, `cutouts` are the everyday things in it, `render` casts rays, `questions` asks what
follows from the geometry, `write` leaves a folder that the trainer and the evaluation read;
`python -m panorama_vlm.synthetic OUT --scenes N --seed S`.
"""
