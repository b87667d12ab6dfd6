// SPDX-License-Identifier: Apache-2.0
// For test_clients.py: a microVM's life through a client library that somebody else wrote.
//
//   node clients.js KIND CLIENT-DIRECTORY SOCKET STEP JSON
//
// KIND: firecrackerode (Firecracker's own vocabulary), or openapi (any client made from a
// description, here the one that GET /openapi gives). Prints the answer as JSON.
'use strict';
const http = require('http');

const [kind, directory, socketPath, step, text] = process.argv.slice(2);
const given = JSON.parse(text || '{}');
const load = (name) => require(require.resolve(name, {paths: [directory]}));

// Each step as a request: [method, path, body].
const plan = {
  boot: () => ['put', '/boot-source', given],
  machine: () => ['put', '/machine-config', given],
  drive: () => ['put', '/drives/{drive_id}', given],
  vsock: () => ['put', '/vsock', given],
  metrics: () => ['put', '/metrics', given],
  start: () => ['put', '/actions', {action_type: 'InstanceStart'}],
  button: () => ['put', '/actions', {action_type: 'SendCtrlAltDel'}],
  info: () => ['get', '/'],
  config: () => ['get', '/machine-config'],
  state: () => ['patch', '/vm', given],
  save: () => ['put', '/snapshot/create', given],
  load: () => ['put', '/snapshot/load', given],
};

function firecrackerode() {
  const Firecracker = load(directory);
  const vm = new Firecracker({socketPath});
  const dial = (method, path, data) => new Promise((resolve, reject) =>
    vm.modem.dial({path, method, data, statusCodes: {200: true, 204: true}},
                  (error, answer) => (error ? reject(error) : resolve(answer))));
  const own = {
    boot: () => vm.bootSource(given),
    machine: () => vm.machineConfig().update(given),
    drive: () => vm.drive(given.drive_id).updatePreboot(given),
    vsock: () => vm.vsock(given),
    metrics: () => vm.metrics(given),
    start: () => vm.action('InstanceStart'),
    button: () => vm.action('SendCtrlAltDel'),
    info: () => vm.info(),
    config: () => vm.machineConfig().get(),
  };
  // What the library has no word for goes through its transport.
  const [method, path, body] = plan[step]();
  return own[step] ? own[step]() : dial(method.toUpperCase(), path, body);
}

function description() {
  return new Promise((resolve, reject) => http.get({socketPath, path: '/openapi'}, (answer) => {
    let whole = '';
    answer.on('data', (piece) => { whole += piece; });
    answer.on('end', () => resolve(JSON.parse(whole)));
  }).on('error', reject));
}

async function openapi() {
  const {OpenAPIClientAxios} = load('openapi-client-axios');
  const api = new OpenAPIClientAxios({
    definition: await description(),
    axiosConfigDefaults: {socketPath, baseURL: 'http://localhost', adapter: 'http'},
  });
  const client = await api.init();
  const [method, path, body] = plan[step]();
  const answer = await client.paths[path][method]({drive_id: given.drive_id}, body);
  return answer.data;
}

(kind === 'openapi' ? openapi() : firecrackerode()).then(
  (answer) => console.log(JSON.stringify(answer || null)),
  (error) => {
    const data = error.response && error.response.data;
    console.error(data ? data.fault_message : error.message);
    process.exit(1);
  });
