// Cases that the npm client runs against a server with its own default transport: `node client.mjs FOLDER CASE`.
// FOLDER has the client in its node_modules. The server's address and key come from the variables that the client
// reads itself, the devbox from DEVBOX.
import assert from 'node:assert/strict';
import { randomUUID } from 'node:crypto';
import { createRequire } from 'node:module';
import { join } from 'node:path';

const load = createRequire(join(process.argv[2], 'package.json'));
const { Runloop, RunloopSDK, toFile } = load('@runloop/api-client');
const client = new Runloop();
const box = process.env.DEVBOX;
const { devboxes } = client;
const { executions } = devboxes;
const binary = Buffer.concat([...Array(4096)].map(() => Buffer.from([...Array(256).keys()])));

async function run(command, id = box) {
  const view = await devboxes.executeAndAwaitCompletion(id, { command });
  assert.equal(view.exit_status, 0, view.stderr);
  return view.stdout;
}

async function joined(stream) {
  let text = '';
  for await (const chunk of await stream) text += chunk.output;
  return text;
}

async function line(iterator) {
  let text = '';
  while (!text.endsWith('\n')) text += (await iterator.next()).value.output;
  return text;
}

async function refused(call, status) {
  await assert.rejects(call, (error) => {
    assert.equal(error.status, status);
    assert.match(error.error.message, /^cannot /);
    return true;
  });
}

const cases = {
  async lifecycle() {
    const made = await devboxes.createAndAwaitRunning({
      name: 'from the client',
      metadata: { purpose: 'test' },
      environment_variables: { COLOUR: 'green' },
      launch_parameters: { resource_size_request: 'X_SMALL' },
    });
    assert.equal(made.status, 'running');
    const view = await devboxes.retrieve(made.id);
    assert.deepEqual([view.name, view.metadata], ['from the client', { purpose: 'test' }]);
    assert.equal(await run('echo $COLOUR', made.id), 'green\n');
    assert.equal((await devboxes.update(made.id, { name: 'renamed' })).name, 'renamed');
    assert.ok(await devboxes.keepAlive(made.id));
    let found = false;
    for await (const one of devboxes.list({ limit: 2 })) if ((found = one.id === made.id)) break;
    assert.ok(found);
    assert.equal((await devboxes.shutdown(made.id)).status, 'shutdown');
    assert.equal((await devboxes.retrieve(made.id)).shutdown_reason, 'api_shutdown');
  },

  async execute() {
    let view = await devboxes.executeAndAwaitCompletion(box, { command: 'echo out; echo err >&2; exit 42' });
    assert.deepEqual([view.exit_status, view.stdout, view.stderr], [42, 'out\n', 'err\n']);
    view = await devboxes.executeAndAwaitCompletion(box, { command: 'seq 1000', last_n: '3' });
    assert.deepEqual([view.stdout, view.stdout_truncated], ['998\n999\n1000\n', true]);
    view = await devboxes.executeAndAwaitCompletion(box, { command: 'sleep 2; echo late', optimistic_timeout: 1 });
    assert.equal(view.stdout, 'late\n');
    const sync = await devboxes.executeSync(box, { command: 'echo out; exit 3' });
    assert.deepEqual([sync.stdout, sync.exit_status], ['out\n', 3]);
  },

  async stdin() {
    const { execution_id } = await devboxes.executeAsync(box, { command: 'cat; echo end >&2', attach_stdin: true });
    const long = 'x'.repeat(100000) + '\n';
    for (const text of ['first\n', 'zweites ü\n', long])
      assert.ok((await executions.sendStdIn(box, execution_id, { text })).success);
    // This client takes a body with nothing but `signal` for options of the request, so it is given another key.
    assert.ok((await executions.sendStdIn(box, execution_id, { signal: 'EOF', text: null })).success);
    const view = await executions.awaitCompleted(box, execution_id);
    assert.deepEqual([view.stdout, view.stderr], ['first\nzweites ü\n' + long, 'end\n']);
  },

  async streams() {
    const command = 'while read -r line; do echo "out $line"; echo "err $line" >&2; done';
    const { execution_id } = await devboxes.executeAsync(box, { command, attach_stdin: true });
    const out = (await executions.streamStdoutUpdates(box, execution_id))[Symbol.asyncIterator]();
    const err = (await executions.streamStderrUpdates(box, execution_id))[Symbol.asyncIterator]();
    for (let turn = 0; turn < 5; turn++) {
      const begun = Date.now();
      await executions.sendStdIn(box, execution_id, { text: `${turn} é\n` });
      assert.equal(await line(out), `out ${turn} é\n`);
      assert.equal(await line(err), `err ${turn} é\n`);
      assert.ok(Date.now() - begun < 1000, 'a stream must not wait for more');
    }
    await executions.sendStdIn(box, execution_id, { signal: 'EOF', text: null });
    for (;;) {
      const { done, value } = await out.next();
      if (done) break;
      assert.equal(value.output, '');
    }
    const again = await joined(executions.streamStdoutUpdates(box, execution_id, { offset: '9' }));
    assert.equal(again, 'out 1 é\nout 2 é\nout 3 é\nout 4 é\n');
  },

  async large_output() {
    const { execution_id } = await devboxes.executeAsync(box, { command: 'seq 200000' });
    const text = await joined(executions.streamStdoutUpdates(box, execution_id));
    assert.equal(text, [...Array(200000).keys()].map((n) => `${n + 1}\n`).join(''));
  },

  async kill() {
    const { execution_id } = await devboxes.executeAsync(box, { command: 'echo up; exec sleep 60' });
    const stream = (await executions.streamStdoutUpdates(box, execution_id))[Symbol.asyncIterator]();
    assert.equal(await line(stream), 'up\n');
    await executions.kill(box, execution_id);
    const view = await executions.awaitCompleted(box, execution_id);
    assert.deepEqual([view.exit_status, view.stdout], [143, 'up\n']);
    await executions.kill(box, execution_id);
  },

  async named_shell() {
    const living = new RunloopSDK().devbox.fromId(box).shell(`shell-${randomUUID()}`);
    await living.exec('cd /tmp; export COLOUR=green; greet() { echo hello $1; }');
    assert.equal(await (await living.exec('pwd; echo $COLOUR; greet you')).stdout(), '/tmp\ngreen\nhello you\n');
    assert.equal((await living.exec('exit 3')).exitCode, 3);
    assert.equal(await (await living.exec('pwd; echo $COLOUR')).stdout(), '/tmp\ngreen\n');
    const lines = [];
    const result = await living.exec('echo a; echo b >&2; sleep 0.5; echo c', { stdout: (text) => lines.push(text) });
    assert.equal(lines.join(''), 'a\nc\n');
    assert.equal(await result.stderr(), 'b\n');
  },

  async files() {
    const folder = `files-${randomUUID()}`;
    for (const contents of ['', 'plain', 'ümlaut \u2028 ✓\r\n']) {
      await devboxes.writeFileContents(box, { file_path: `${folder}/text`, contents });
      assert.equal(await devboxes.readFileContents(box, { file_path: `~/${folder}/text` }), contents);
    }
    await devboxes.uploadFile(box, { path: `~/${folder}/binary`, file: await toFile(binary, 'binary') });
    const got = await devboxes.downloadFile(box, { path: `${folder}/binary` });
    assert.ok(Buffer.from(await got.arrayBuffer()).equals(binary));
    assert.equal(await run(`stat -c '%U %s' ${folder}/binary`), `user ${binary.length}\n`);
  },

  async errors() {
    await refused(() => devboxes.retrieve('dbx_' + '0'.repeat(21)), 404);
    await refused(() => devboxes.retrieve('dbx_nonexistent12345'), 400);
    await refused(() => devboxes.readFileContents(box, { file_path: 'missing' }), 404);
    await refused(() => devboxes.executeAsync(box, { command: '' }), 400);
    await refused(() => new Runloop({ bearerToken: 'ak_wrong' }).devboxes.list(), 401);
  },

  async many_at_once() {
    const all = [...Array(200).keys()].map((n) =>
      devboxes.executeAndAwaitCompletion(box, { command: `sleep 0.2; echo ${n}` }),
    );
    const views = await Promise.all(all);
    views.forEach((view, n) => assert.equal(view.stdout, `${n}\n`));
  },

  // Follow the stream of EXECUTION into standard output. The client opens it again by itself after a 408; a connection
  // that is cut looks like a clean end to it, so the execution is asked whether that was the end.
  // A stream that a killed server cuts looks whole, so only one that was opened after the end and brought nothing is.
  async follow() {
    let offset = '0';
    let completed = false;
    for (;;) {
      let news = false;
      const stream = await executions.streamStdoutUpdates(box, process.env.EXECUTION, { offset });
      try {
        for await (const chunk of stream) {
          offset = String(chunk.offset);
          news ||= chunk.output !== '';
          process.stdout.write(chunk.output);
        }
      } catch (error) {
        if (error.status !== undefined) throw error;
      }
      if (process.env.ONCE || (completed && !news)) return;
      completed = await ended();
    }
  },
};

// Whether EXECUTION has completed. While the server is down this client must not be asked: it never answers then,
// because it keeps a request for which no connection can be made until a later one gets through.
async function ended() {
  for (;;) {
    const health = await fetch(`${client.baseURL}/healthz`).catch(() => ({ ok: false }));
    if (health.ok) break;
    await new Promise((resolve) => setTimeout(resolve, 100));
  }
  return (await executions.retrieve(box, process.env.EXECUTION)).status === 'completed';
}

await cases[process.argv[3]]();
process.exit(0);
