"""The walk, the table of corpora, and what a user is told where a directory is not a corpus."""

import os
from pathlib import Path

import pytest

from ser_ray import corpora
from ser_ray.corpora.files import audio_files, from_names
from ser_ray.schema import Rejected, UserError, Utterance


def touch(directory, *names):
    for name in names:
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def parse_any(path):
    if path.stem == "bad":
        raise ValueError("that is bad")
    return Utterance(f"any/{path.stem}", "any", "any/1", "sad", path.as_posix())


def test_audio_files_are_found_at_any_depth_in_order(tmp_path):
    touch(tmp_path, "b.WAV", "a/deep/er/c.flac", "a/z.Flac", "a/notes.txt", "d.mp3", "wav", ".hidden.wav", "a/._c.flac")
    touch(tmp_path, ".git/x.wav", "__MACOSX/._b.wav", "e.M4A")
    found = ["a/deep/er/c.flac", "a/z.Flac", "b.WAV", "d.mp3", "e.M4A"]
    assert audio_files(tmp_path) == [Path(name) for name in found]


def test_of_several_formats_of_a_recording_wav_is_used(tmp_path):
    touch(tmp_path, "a/1.m4a", "a/2.mp3", "wav/1.wav")
    utterances, rejected = from_names(tmp_path, parse_any)
    assert [utterance.path for utterance in utterances] == ["wav/1.wav", "a/2.mp3"]
    assert [(each.path, each.reason) for each in rejected] == [
        ("a/1.m4a", "the same utterance as wav/1.wav, which is used")
    ]


def test_a_name_that_is_not_utf8_is_rejected_and_named(tmp_path):
    touch(tmp_path, "1.wav")
    (tmp_path / os.fsdecode(b"caf\xe9.wav")).touch()
    utterances, rejected = from_names(tmp_path, parse_any)
    assert [utterance.path for utterance in utterances] == ["1.wav"]
    assert [(each.path, each.reason) for each in rejected] == [
        ("caf\\xe9.wav", "the name is not UTF-8; rename the file")
    ]


def test_links_to_folders_are_followed_once(tmp_path):
    touch(tmp_path, "shared/a.wav", "corpus/b.wav")
    (tmp_path / "corpus/link").symlink_to(tmp_path / "shared")
    (tmp_path / "corpus/loop").symlink_to(tmp_path / "corpus")
    assert audio_files(tmp_path / "corpus") == [Path("b.wav"), Path("link/a.wav")]


def test_from_names_sorts_by_id_and_reports_the_rest(tmp_path):
    touch(tmp_path, "z/1.wav", "a/2.wav", "y/1.flac", "a/bad.wav")
    utterances, rejected = from_names(tmp_path, parse_any)
    assert [(u.utterance_id, u.path) for u in utterances] == [("any/1", "y/1.flac"), ("any/2", "a/2.wav")]
    assert rejected == [
        Rejected("a/bad.wav", "that is bad"),
        Rejected("z/1.wav", "the same utterance as y/1.flac, which is used"),
    ]


def test_names_are_those_of_the_modules():
    folder = Path(corpora.__file__).parent
    shared = {"__init__", "files", "espeak", "table", "rows", "inside", "guess", "emobox", "audformat", "describe"}
    assert set(corpora.NAMES) == {path.stem for path in folder.glob("*.py")} - shared


@pytest.mark.parametrize("name", corpora.NAMES)
def test_read_says_what_is_missing(tmp_path, name):
    with pytest.raises(UserError, match=rf"nowhere: no such directory; set experiment\.corpora\.{name} "):
        corpora.read(name, tmp_path / "nowhere")
    with pytest.raises(UserError, match=rf"no recording is named like those of {name}; set experiment"):
        corpora.read(name, tmp_path)
    touch(tmp_path, "other.wav")
    with pytest.raises(UserError, match=r"\(1 rejected, such as other.wav: the name is not ") as error:
        corpora.read(name, tmp_path)
    assert "\n" not in str(error.value)


def test_read_names_the_known_corpora(tmp_path):
    with pytest.raises(
        UserError,
        match=r"experiment\.corpora\.ravdes: .* crema_d, emodb, ravdess, ravdess_song, savee, synthetic, tess",
    ):
        corpora.read("ravdes", tmp_path)


def test_a_corpus_twice_in_its_own_folder_counts_once(tmp_path):
    name = "Actor_01/03-01-01-01-01-01-01.wav"
    touch(tmp_path, name, f"audio_speech_actors_01-24/{name}")
    utterances, rejected = corpora.read("ravdess", tmp_path)
    assert [u.path for u in utterances] == [name]
    assert [r.path for r in rejected] == [f"audio_speech_actors_01-24/{name}"]
