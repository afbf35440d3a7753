"""Who may import whom, what must load without what, and that packaging knows all of it."""

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())

# What each folder may import of ours beside itself. configs takes dataclasses and names; launch
# loads a run's config by path and reads only the defaults.
ALLOWED = {
    'kernels': (),
    'moe': ('kernels', 'nn.types', 'nn.param', 'nn.config', 'nn.linear'),
    'nn': ('moe', 'kernels'),
    'rl': ('nn.types', 'nn.param'),
    'data': ('nn.types',),
    'evals': ('rl.rewards', 'rl.types', 'rl.sample'),
    'configs': ('nn.config', 'rl', 'data'),
    'launch': ('kernels', 'moe', 'nn', 'rl', 'data', 'evals', 'configs.base'),
}
FOLDERS = [folder for folder in ALLOWED if (ROOT / folder).is_dir()]
FILES = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob('*.py'))]

# Imported where a user asks for them, and named in the error if they are missing.
OPTIONAL = {'wandb'}
# Brought by the extra 'eval', and imported by one module alone.
EVALUATION = {'seqio', 'tensorflow'}


def imports(path: Path) -> list[str]:
  """Dotted names of everything a file imports, wherever in it."""
  found = []
  for node in ast.walk(ast.parse(path.read_text(), str(path))):
    if isinstance(node, ast.Import):
      found += [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
      assert node.level == 0, f'{path}: relative imports hide the arrows'
      found += [f'{node.module}.{alias.name}' for alias in node.names]
  return found


def module_name(path: Path) -> str:
  return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def within(name: str, parents: tuple[str, ...]) -> bool:
  return any(name == parent or name.startswith(parent + '.') for parent in parents)


@pytest.mark.parametrize('folder', FOLDERS)
def test_folders_import_along_the_arrows(folder):
  allowed = (folder, *ALLOWED[folder])
  wrong = [f'{module_name(path)} imports {name}'
           for path in FILES if path.relative_to(ROOT).parts[0] == folder
           for name in imports(path)
           if name.split('.')[0] in ALLOWED and not within(name, allowed)]
  assert not wrong


def test_the_types_import_nothing_of_ours():
  for name in ('nn/types.py', 'nn/param.py', 'nn/config.py'):
    assert not [n for n in imports(ROOT / name) if n.split('.')[0] in ALLOWED], name


def test_no_file_in_launch_is_named_like_a_standard_module():
  # Python puts the folder of the script first on its path, where such a file hides the module.
  names = {path.stem for path in (ROOT / 'launch').glob('*.py')}
  assert not names & sys.stdlib_module_names


def test_the_kernels_package_does_nothing_when_imported():
  # Other libraries look for a module of this name and may import it to read its version.
  tree = ast.parse((ROOT / 'kernels/__init__.py').read_text())
  assert all(isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
             for node in tree.body)


def test_every_package_is_listed():
  folders = {module_name(path) for path in FILES if path.name == '__init__.py'}
  assert sorted(folders) == PROJECT['tool']['setuptools']['packages']
  assert not [path for path in FILES if not (path.parent / '__init__.py').exists()]


def plain(requirement: str) -> str:
  """The normalised name of a distribution in a requirement."""
  return re.sub('[-_.]+', '-', re.match(r'[\w.-]+', requirement).group()).lower()


def test_only_evaluation_tasks_import_seqio_and_tensorflow():
  found = {module_name(path) for path in FILES
           if {n.split('.')[0] for n in imports(path)} & EVALUATION}
  assert found == {'evals.tasks'}
  assert not [path for path in FILES if path.parent.name != 'launch'
              if 'evals.tasks' in imports(path)]


def test_what_is_imported_is_declared():
  declared = {plain(r) for r in PROJECT['project']['dependencies']}
  assert EVALUATION <= {plain(r) for r in PROJECT['project']['optional-dependencies']['eval']}
  providers = importlib.metadata.packages_distributions()
  missing = {}
  for path in FILES:
    for name in {n.split('.')[0] for n in imports(path)} - sys.stdlib_module_names - set(ALLOWED):
      given = {plain(d) for d in providers.get(name, [name])}
      if not given & declared and name not in OPTIONAL | EVALUATION:
        missing.setdefault(name, []).append(module_name(path))
  assert not missing


def test_constraints_are_portable():
  lines = (ROOT / 'constraints.txt').read_text().splitlines()
  pattern = r"[a-z0-9-]+==[0-9][0-9a-z.]*( ; [a-z_0-9<>=!.'() -]+)?"
  assert not [line for line in lines if not re.fullmatch(pattern, line, re.IGNORECASE)]
  pinned = {plain(line) for line in lines}
  extras = PROJECT['project']['optional-dependencies']
  wanted = PROJECT['project']['dependencies'] + [r for group in extras.values() for r in group]
  assert not {plain(r) for r in wanted} - pinned


def run(script: str) -> str:
  """Runs a script in a fresh process with the repository first on its path; returns its output."""
  done = subprocess.run([sys.executable, '-c', script], capture_output=True, text=True, timeout=300,
                        env=os.environ | {'PYTHONPATH': str(ROOT)})
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def modules(*folders: str) -> list[str]:
  return [module_name(path) for path in FILES if path.relative_to(ROOT).parts[0] in folders]


def test_training_loads_neither_tensorflow_nor_seqio():
  wanted = modules('kernels', 'moe', 'nn', 'rl', 'data', 'configs', 'launch')
  run(f'''
import importlib, sys
for name in {wanted}:
  importlib.import_module(name)
heavy = {{'tensorflow', 'seqio', 'torch', 'transformers'}} & set(sys.modules)
assert not heavy, heavy
''')


def test_the_core_loads_without_data_and_config_libraries():
  # A machine for kernels and train steps need not have them.
  wanted = modules('kernels', 'moe', 'nn', 'rl')
  wanted += ['launch.step', 'launch.mesh', 'launch.optimizer']
  run(f'''
import importlib, importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
  def find_spec(self, name, path, target=None):
    if name.split('.')[0] in ('grain', 'ml_collections', 'tensorflow', 'seqio'):
      raise ImportError(f'{{name}} must not be needed here')

sys.meta_path.insert(0, Refuse())
for name in {wanted}:
  importlib.import_module(name)
''')


@pytest.mark.extras
def test_transformers_works_beside_our_packages():
  pytest.importorskip('transformers')
  run(f'''
import transformers
config = transformers.LlamaConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=8)
model = transformers.LlamaForCausalLM(config)
import kernels, torch
assert kernels.__file__.startswith({str(ROOT)!r})
assert model(torch.tensor([[1, 2]])).logits.shape == (1, 2, 8)
''')


@pytest.mark.extras
def test_evaluation_libraries_load_beside_our_packages():
  pytest.importorskip('seqio')
  run('''
import data.tokenizer, seqio
assert seqio.ByteVocabulary().vocab_size == data.tokenizer.load('bytes').vocab_size
''')
