"The command line, as a user types it."
import os, re, signal, subprocess, sys, time
import pytest
from opensora_nb.commands.cli import COMMANDS, commands
OSNB = [sys.executable, "-m", "opensora_nb.commands.cli"]
THERE = sorted(commands())

def osnb(*words, **kwargs): return subprocess.run([*OSNB, *map(str, words)], capture_output=True, text=True, stdin=subprocess.DEVNULL, **kwargs)

def is_one_line(text): return text.startswith("osnb") and text.count("\n") == 1 and "Traceback" not in text

@pytest.mark.parametrize("words", [(), ("--help",), ("-h",)])
def test_help_lists_the_commands(words):
    r = osnb(*words)
    assert r.returncode == 0 and not r.stderr
    assert all(re.search(rf"^  {name} +{re.escape(COMMANDS[name])}$", r.stdout, re.M) for name in THERE)

def test_help_imports_neither_torch_nor_the_option_parser():
    r = subprocess.run([sys.executable, "-X", "importtime", "-m", "opensora_nb.commands.cli", "--help"], capture_output=True, text=True)
    assert not re.search(r"\| +(torch|tyro|numpy)$", r.stderr, re.M)

def test_a_typo_in_the_command_is_one_line_with_the_right_word():
    r = osnb("docter")
    assert r.returncode == 2 and is_one_line(r.stderr) and "did you mean 'doctor'" in r.stderr and not r.stdout

def test_an_option_before_the_command_is_one_line():
    r = osnb("--seed", 3, "generate")
    assert r.returncode == 2 and is_one_line(r.stderr)

@pytest.mark.parametrize("name", THERE)
def test_each_command_tells_its_options(name):
    r = osnb(name, "--help")
    assert r.returncode == 0 and f"osnb {name}" in r.stdout, r.stderr

@pytest.mark.parametrize("name", THERE)
def test_an_unknown_option_is_a_usage_error(name):
    r = osnb(name, "--no-such-option", 3)
    assert r.returncode == 2 and is_one_line(r.stderr) and f"osnb {name}" in r.stderr and "--help" in r.stderr      # a missing argument may be named first

@pytest.mark.parametrize("words, said", [("train pocket --stps 5 --namee x", "unrecognized options: --stps, 5, --namee, x; did you mean --name?; did you mean --steps? (osnb train --help lists the options)"),
                                         ("curate", "missing PATH, --out PATH (osnb curate --help"), ("doctor --timeout-s soon", "error parsing --timeout-s: could not convert string to float: 'soon' (osnb doctor"),
                                         ("serve tunng", "available subcommands: tuning, explorer, preference, rooms"), ("generate --prompt a --seed", "missing value for argument '--seed'"), ("plan pocket --gpus abc", "['abc'] (osnb plan")])
def test_words_that_are_no_options_are_one_line_with_the_nearest(words, said):
    r = osnb(*words.split())
    assert r.returncode == 2 and is_one_line(r.stderr) and said in r.stderr, r.stderr

@pytest.mark.skipif("curate" not in THERE, reason="curate is not part of this installation")
def test_curating_a_missing_folder_is_one_line_and_writes_nothing(tmp_path):
    r = osnb("curate", tmp_path / "nowhere", "--out", tmp_path / "out")
    assert r.returncode == 2 and is_one_line(r.stderr) and "nowhere" in r.stderr
    assert not (tmp_path / "out").exists()

def test_a_bad_value_is_a_usage_error_without_traceback():
    r = osnb("doctor", "--folder", "no/such/folder")
    assert r.returncode == 2 and "no/such/folder" in r.stderr and is_one_line(r.stderr)

def test_a_package_that_is_not_installed_is_one_line_with_the_command_that_brings_it(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("import sys; sys.modules['tyro'] = None")       # as if it were not there
    r = osnb("doctor", env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])})
    assert r.returncode == 2 and is_one_line(r.stderr) and r.stderr.endswith("pip install tyro\n")

@pytest.mark.slow
def test_doctor_tries_the_named_packages_and_its_code_says_whether_all_needed_is_there():
    r = osnb("doctor")
    for package in ("torch", "jupyterlab", "nbdev", "ipywidgets", "matplotlib", "triton", "colossalai", "transformers", "decord2", "scenedetect-headless", "vbench"):
        assert re.search(rf"^(ok|optional|MISSING) +{package} ", r.stdout, re.M), package
    assert re.search(r"^ok +H.264 ", r.stdout, re.M)
    assert r.returncode == (1 if re.search("^MISSING ", r.stdout, re.M) else 0), r.stderr
    assert "Traceback" not in r.stderr

@pytest.mark.parametrize("command", [["-c", "from opensora_nb.commands.cli import exit_code; import sys; sys.exit(exit_code(lambda: [print(i, flush=True) for i in range(10**7)] and 0, 'doctor'))"],
                                     pytest.param(["-m", "opensora_nb.commands.cli", "doctor"], marks=[pytest.mark.slow, pytest.mark.soak])], ids=["many-lines", "doctor"])
def test_a_reader_that_goes_away_ends_it_quietly(command):
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as p:
        p.stdout.readline(); p.stdout.close()
        assert (p.wait(300), p.stderr.read()) == (141, "")

def test_ctrl_c_is_one_line_and_code_130():
    with subprocess.Popen([*OSNB, "doctor"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True) as p:
        p.stdout.readline()                                     # it has begun
        time.sleep(0.3)
        os.killpg(p.pid, signal.SIGINT)                         # as a terminal does: the whole group
        assert p.wait(300) == 130 and p.stderr.read() == "osnb doctor: interrupted\n"
