# Tests of the drop-in surfaces with their real hosts; included by the Makefile.

HOSTS := build/integrations

.PHONY: test-integrations

# transformers is in .venv, each other host in an environment of its own.
test-integrations: $(HOSTS)/litellm/.installed $(HOSTS)/lmms-eval/.installed $(HOSTS)/vlmevalkit/.installed
	$(BIN)/python -m pytest -q tests/integrations $(PYTEST_ARGS)
	$(HOSTS)/litellm/bin/python -m pytest -q tests/integrations/test_litellm_provider.py $(PYTEST_ARGS)
	$(HOSTS)/lmms-eval/bin/python -m pytest -q tests/integrations/test_lmms_eval*.py $(PYTEST_ARGS)
	$(HOSTS)/vlmevalkit/bin/python -m pytest -q tests/integrations/test_vlmevalkit.py $(PYTEST_ARGS)

# Environments on top of .venv: its torch, transformers and ovfast, and a host with what it imports.
# The kits' whole lists do not install beside a CPU build of torch: torchvision, and timm with it,
# comes from PyPI for CUDA alone. lmms-eval does without; VLMEvalKit uses its Python parts, which
# tests/integrations/torchvision_cpu.py makes importable.
$(HOSTS)/lmms-eval/.installed: NO_DEPS := lmms-eval==0.7.3
$(HOSTS)/vlmevalkit/.installed: NO_DEPS := ms-vlmeval==0.0.20 torchvision==0.28.0

$(HOSTS)/%/.installed: tests/integrations/%.txt $(VENV)/.installed
	rm -rf $(@D)
	$(BIN)/python -m venv --without-pip $(@D)
	$(BIN)/python -c "import site; print('import site; site.addsitedir(%r)' % site.getsitepackages()[0])" \
		> $$($(@D)/bin/python -c "import site; print(site.getsitepackages()[0])")/venv.pth
	$(@D)/bin/python -m pip install --quiet --requirement $<
	$(if $(NO_DEPS),$(@D)/bin/python -m pip install --quiet --no-deps $(NO_DEPS))
	@touch $@
