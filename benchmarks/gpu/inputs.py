"""Images and codecs, made before the first section."""

from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from benchmarks.gpu._setting import Setting, image_folder, ready_codec


def run(setting: Setting) -> None:
    if setting.tiny:
        image_folder(setting)
        for stage in (4, 3):
            ready_codec(setting, stage)
        return
    with ProcessPoolExecutor(3, get_context("spawn")) as pool:
        jobs = [pool.submit(image_folder, setting)]
        jobs += [pool.submit(ready_codec, setting, stage) for stage in (4, 3)]
        for job in jobs:
            job.result()
